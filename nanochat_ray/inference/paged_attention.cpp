// Attention of one query a row over the pages that hold its sequence's keys and values.
//
// Decoding many rows is bound by how fast their pages are read. These lie anywhere in memory, which the processor does
// not foresee: so each key that is read asks for its like in the next page.

#include <ATen/ATen.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using Floats = at::vec::VectorizedN<float, 2>;
constexpr int64_t LANES = Floats::size(), MOST_DIM = 1024;

// `count` elements, and anything after them.
inline Floats load(const float* x, int64_t count) { return Floats::loadu(x, count); }

inline Floats load(const at::BFloat16* x, int64_t count) {
  return at::vec::convert<float, 2, at::BFloat16, 1>(at::vec::Vectorized<at::BFloat16>::loadu(x, count));
}

inline void store(Floats values, float* x, int64_t count) { values.store(x, count); }

inline void store(Floats values, at::BFloat16* x, int64_t count) {
  at::vec::convert<at::BFloat16, 1, float, 2>(values).store(x, count);
}

template <typename T>
inline void prefetch(const T* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(row + d, 0, 2);  // into L2, where a page has room
}

// q and y (D), one head's. keys and values are that head's in page 0; from page to page it is `stride` elements. Seen
// are the tokens from `first` to `last`, counted from the beginning of pages[0]. weights has room for a page's. No
// maximum is taken off before exp: the norms of q and k bound scores by 1.44·√D. DIM is D, to unroll its loops, or 0.
template <typename T, int64_t DIM>
void attend(const T* q, const T* keys, const T* values, const int64_t* pages, int64_t stride, int64_t PAGE, int64_t dim,
            int64_t first, int64_t last, float* weights, T* y) {
  const int64_t D = DIM ? DIM : dim, N = (D + LANES - 1) / LANES;
  const auto count = [D](int64_t i) { return std::min(LANES, D - i * LANES); };
  Floats query[((DIM ? DIM : MOST_DIM) + LANES - 1) / LANES], sum[((DIM ? DIM : MOST_DIM) + LANES - 1) / LANES];
  for (int64_t i = 0; i < N; i++) {
    query[i] = Floats::set(Floats(0), load(q + i * LANES, count(i)) * Floats(1 / std::sqrt(float(D))), count(i));
    sum[i] = Floats(0);
  }
  float total = 0;
  for (int64_t block = first / PAGE; block <= last / PAGE; block++) {
    const int64_t begin = std::max<int64_t>(0, first - block * PAGE), end = std::min(PAGE, last + 1 - block * PAGE);
    const int64_t here = pages[block] * stride, next = pages[std::min(block + 1, last / PAGE)] * stride;
    for (int64_t t = begin; t < end; t++) {
      Floats products(0);
      for (int64_t i = 0; i < N; i++)
        products = products + query[i] * load(keys + here + t * D + i * LANES, count(i));
      weights[t] = at::vec::vec_reduce_all<float, 2>([](auto a, auto b) { return a + b; }, products);
      prefetch(keys + next + t * D, D);
    }
    at::vec::map<float>([](auto scores) { return scores.exp(); }, weights + begin, weights + begin, end - begin);
    for (int64_t t = begin; t < end; t++) {
      total += weights[t];
      for (int64_t i = 0; i < N; i++)
        sum[i] = sum[i] + Floats(weights[t]) * load(values + here + t * D + i * LANES, count(i));
      prefetch(values + next + t * D, D);
    }
  }
  for (int64_t i = 0; i < N; i++) store(sum[i] / Floats(total), y + i * LANES, count(i));
}

template <typename T>
void attend_rows(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
                 const at::Tensor& at, int64_t window, at::Tensor& y) {
  const int64_t B = q.size(0), K = keys.size(1), PAGE = keys.size(2), D = keys.size(3), H = q.size(2);
  const int64_t *pages = table.const_data_ptr<int64_t>(), *places = at.const_data_ptr<int64_t>();
  const T *queries = q.const_data_ptr<T>(), *k = keys.const_data_ptr<T>(), *v = values.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  const auto attend_head = D == 64 ? attend<T, 64> : D == 128 ? attend<T, 128> : attend<T, 0>;
  #pragma omp parallel
  {
    std::vector<float> weights(PAGE);
    #pragma omp for schedule(dynamic)  // rows differ in length
    for (int64_t i = 0; i < B * H; i++) {
      const int64_t row = i / H, head = i % H / (H / K) * PAGE * D, last = places[row];
      attend_head(queries + i * D, k + head, v + head, pages + row * table.size(1), K * PAGE * D, PAGE, D,
                  std::max<int64_t>(0, last - window), last, weights.data(), out + i * D);
    }
  }
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& table, const at::Tensor& at, int64_t window) {
  TORCH_CHECK(q.size(-1) <= MOST_DIM, "a head of ", q.size(-1), " channels is larger than ", MOST_DIM);
  auto y = at::empty(q.sizes(), q.options());
  const auto attend = q.scalar_type() == at::kBFloat16 ? attend_rows<at::BFloat16> : attend_rows<float>;
  attend(q.contiguous(), keys, values, table.contiguous(), at.contiguous(), window, y);
  return y;
}

at::Tensor shape_alone(const at::Tensor& q, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                       int64_t) {
  return at::empty_symint(q.sym_sizes(), q.options());
}

}  // namespace

TORCH_LIBRARY(nanochat_ray, library) {
  library.def("paged_attention(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor at, int window) -> Tensor");
}
TORCH_LIBRARY_IMPL(nanochat_ray, CPU, library) { library.impl("paged_attention", paged_attention); }
TORCH_LIBRARY_IMPL(nanochat_ray, Meta, library) { library.impl("paged_attention", shape_alone); }

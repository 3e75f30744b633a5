// Attention of sequences' next tokens over the pages that hold their keys and values.
//
// Decoding many sequences is bound by how fast their pages are read. These lie anywhere in memory, which the processor
// does not foresee: so each key that is read asks for its like in the next page, the last page's in the first page of
// what the thread attends to next. Reading a prompt is bound by products: there a page is read for as many queries as a
// vector has lanes.

#include <ATen/ATen.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

namespace {

using Floats = at::vec::VectorizedN<float, 2>;
using HalfFloats = at::vec::VectorizedN<float, 1>;
constexpr int64_t LANES = Floats::size(), MOST_DIM = 1024;
constexpr int64_t STEP = 8;  // keys, or queries, whose sums stay in registers; it divides LANES

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
// are the tokens from `first` to `last`, counted from the beginning of pages[0]; `after` elements from keys is the page
// read next. weights has room for a page's. No maximum is taken off before exp: the norms of q and k bound scores by
// 1.44·√D. DIM is D, to unroll its loops, or 0.
template <typename T, int64_t DIM>
void attend(const T* q, const T* keys, const T* values, const int64_t* pages, int64_t stride, int64_t PAGE, int64_t dim,
            int64_t first, int64_t last, int64_t after, float* weights, T* y) {
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
    const int64_t here = pages[block] * stride, next = block < last / PAGE ? pages[block + 1] * stride : after;
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

// A multiple of LANES.
template <typename T>
inline void widen(const T* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += LANES) load(x + i, LANES).store(y + i);
}

// What a thread needs to attend by blocks: queries by channel (D, LANES), a page (PAGE, D), its weights (PAGE, LANES),
// sums (LANES, D), and room for more lanes than D fills.
struct Scratch {
  std::unique_ptr<float[]> memory;
  float *weights, *page, *queries, *sums;

  Scratch(int64_t PAGE, int64_t D) : memory(new float[PAGE * LANES + PAGE * D + D * LANES + LANES * (D + 2 * LANES)]) {
    weights = memory.get(), page = weights + PAGE * LANES, queries = page + PAGE * D + LANES;
    sums = queries + D * LANES;
  }
};

// As attend, of `count` adjacent tokens' queries, no more than Queries has lanes, which lie `apart` from each other, as
// y does: the first is at place `at` of its pages. Each sees `window` tokens before itself.
template <typename T, int64_t DIM, typename Queries>
void attend_block(const T* q, int64_t count, int64_t apart, const T* keys, const T* values, const int64_t* pages,
                  int64_t stride, int64_t PAGE, int64_t dim, int64_t at, int64_t window, Scratch& scratch, T* y) {
  const int64_t D = DIM ? DIM : dim, N = (D + LANES - 1) / LANES, last = at + count - 1;
  constexpr int64_t MOST = Queries::size();  // fewer than STEP where vectors are of four
  float *weights = scratch.weights, *page = scratch.page, *queries = scratch.queries, *sums = scratch.sums;
  std::fill_n(queries, D * MOST, 0.0f);
  std::fill_n(sums, std::max(MOST, STEP) * N * LANES, 0.0f);
  for (int64_t i = 0; i < count; i++)
    for (int64_t d = 0; d < D; d++) queries[d * MOST + i] = float(q[i * apart + d]) / std::sqrt(float(D));
  float lanes[MOST];
  std::iota(lanes, lanes + MOST, 0.0f);
  const Queries lane = Queries::loadu(lanes);
  Queries total(0);
  for (int64_t block = std::max<int64_t>(0, at - window) / PAGE; block <= last / PAGE; block++) {
    const int64_t here = pages[block] * stride, start = block * PAGE;
    const int64_t begin = std::max<int64_t>(0, at - window - start), end = std::min(PAGE, last + 1 - start);
    widen(keys + here, PAGE * D, page);
    for (int64_t t = begin / STEP * STEP; t < end; t += STEP) {
      Queries products[STEP];
      for (int64_t j = 0; j < STEP; j++) products[j] = Queries(0);
      for (int64_t d = 0; d < D; d++) {
        const Queries channel = Queries::loadu(queries + d * MOST);
        for (int64_t j = 0; j < STEP; j++) products[j] = fmadd(Queries(page[(t + j) * D + d]), channel, products[j]);
      }
      for (int64_t j = 0; j < STEP; j++) {  // a mask by bits also hides what is no number, in places not yet stored
        const float before = start + t + j - at;
        const Queries visible = (lane >= Queries(before)) & (lane <= Queries(before + window));
        const Queries seen = products[j].exp() & visible;
        seen.store(weights + (t + j) * MOST);
        total = total + seen;
      }
    }
    widen(values + here, PAGE * D, page);
    for (int64_t i = 0; i < count; i += STEP)
      for (int64_t n = 0; n < N; n++) {
        Floats products[STEP];
        for (int64_t j = 0; j < STEP; j++) products[j] = Floats::loadu(sums + ((i + j) * N + n) * LANES);
        for (int64_t t = begin; t < end; t++) {
          const Floats value = Floats::loadu(page + t * D + n * LANES);
          for (int64_t j = 0; j < STEP; j++)
            products[j] = fmadd(Floats(weights[t * MOST + i + j]), value, products[j]);
        }
        for (int64_t j = 0; j < STEP; j++) products[j].store(sums + ((i + j) * N + n) * LANES);
      }
  }
  float totals[MOST];
  total.store(totals);
  for (int64_t i = 0; i < count; i++)
    for (int64_t n = 0; n < N; n++)
      store(Floats::loadu(sums + (i * N + n) * LANES) / Floats(totals[i]), y + i * apart + n * LANES,
            std::min(LANES, D - n * LANES));
}

// Some adjacent tokens of one sequence.
struct Span {
  int64_t sequence, begin, count;
};

std::vector<Span> spans_of(const int64_t* last, int64_t sequences) {
  std::vector<Span> spans;
  for (int64_t sequence = 0, begin = 0; sequence < sequences; sequence++)
    for (; begin <= last[sequence]; begin += spans.back().count)
      spans.push_back({sequence, begin, std::min(LANES, last[sequence] + 1 - begin)});
  return spans;
}

template <typename T, int64_t DIM>
void attend_all(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& table,
                const at::Tensor& last, const at::Tensor& at, int64_t window, at::Tensor& y) {
  const int64_t K = keys.size(1), PAGE = keys.size(2), D = keys.size(3), H = q.size(1), stride = K * PAGE * D;
  const int64_t *pages = table.const_data_ptr<int64_t>(), *places = at.const_data_ptr<int64_t>();
  const T *queries = q.const_data_ptr<T>(), *k = keys.const_data_ptr<T>(), *v = values.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  const std::vector<Span> spans = spans_of(last.const_data_ptr<int64_t>(), last.size(0));
  const int64_t count = spans.size() * H;
  const auto span_of = [&](int64_t i) -> const Span& { return spans[spans.size() - 1 - i / H]; };
  const auto head_of = [&](int64_t i) { return i % H / (H / K) * PAGE * D; };
  const auto first_of = [&](const Span& span) { return std::max<int64_t>(0, places[span.begin] - window); };
  const auto pages_of = [&](const Span& span) { return pages + span.sequence * table.size(1); };
  // They differ in length; prompts come last in a batch, and first here. A thread takes a head of a prompt, but heads
  // of one token that lie side by side, all of a sequence where there are enough sequences.
  std::vector<int64_t> shares{0};
  while (shares.back() < count)
    shares.push_back(shares.back() + (span_of(shares.back()).count == 1 && spans.size() >= 8 ? H : 1));
  const auto attend_to = [&](int64_t i, Scratch& scratch) {
    const int64_t following = std::min(i + 1, count - 1), head = head_of(i);
    const Span &span = span_of(i), &next = span_of(following);
    const int64_t query = (span.begin * H + i % H) * D, place = places[span.begin];
    const int64_t* own = pages_of(span);
    const int64_t after = pages_of(next)[first_of(next) / PAGE] * stride + head_of(following) - head;
    if (span.count == 1)
      attend<T, DIM>(queries + query, k + head, v + head, own, stride, PAGE, D, first_of(span), place, after,
                     scratch.weights, out + query);
    else
      (span.count > HalfFloats::size() ? attend_block<T, DIM, Floats> : attend_block<T, DIM, HalfFloats>)(
          queries + query, span.count, H * D, k + head, v + head, own, stride, PAGE, D, place, window, scratch,
          out + query);
  };
  #pragma omp parallel
  {
    Scratch scratch(PAGE, D);
    #pragma omp for schedule(dynamic)
    for (size_t share = 1; share < shares.size(); share++)
      for (int64_t i = shares[share - 1]; i < shares[share]; i++) attend_to(i, scratch);
  }
}

template <typename T>
auto attend_of(int64_t D) {
  return D == 64 ? attend_all<T, 64> : D == 128 ? attend_all<T, 128> : attend_all<T, 0>;
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& table, const at::Tensor& last, const at::Tensor& at, int64_t window) {
  TORCH_CHECK(q.size(-1) <= MOST_DIM, "a head of ", q.size(-1), " channels is larger than ", MOST_DIM);
  TORCH_CHECK(keys.size(2) % LANES == 0, "a page of ", keys.size(2), " tokens is no multiple of ", LANES);
  auto y = at::empty(q.sizes(), q.options());
  const auto attend = (q.scalar_type() == at::kBFloat16 ? attend_of<at::BFloat16> : attend_of<float>)(q.size(-1));
  attend(q.contiguous(), keys, values, table.contiguous(), last.contiguous(), at.contiguous(), window, y);
  return y;
}

at::Tensor shape_alone(const at::Tensor& q, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                       const at::Tensor&, int64_t) {
  return at::empty_symint(q.sym_sizes(), q.options());
}

}  // namespace

TORCH_LIBRARY(nanochat_ray, library) {
  library.def(
      "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor last, Tensor at, int window) -> "
      "Tensor");
}
TORCH_LIBRARY_IMPL(nanochat_ray, CPU, library) { library.impl("paged_attention", paged_attention); }
TORCH_LIBRARY_IMPL(nanochat_ray, Meta, library) { library.impl("paged_attention", shape_alone); }

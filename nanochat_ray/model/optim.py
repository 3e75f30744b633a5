"""MuonAdamW: Muon for the matrices of the blocks, AdamW for everything else, sharded over the ranks (ZeRO-2).

The optimizer reduces gradients itself, so models are not wrapped in DDP: each rank receives the mean gradient of
its own shard, updates that shard with the only copy of its state, and the shards are gathered back. One rank takes
the same path with nothing to send.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from nanochat_ray.model.compiling import compile_static
from nanochat_ray.model.gpt import GPT

# Coefficients of five Polar Express steps (arXiv:2505.16932), safety factor 1.01.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SMALL = 1024  # tensors with fewer elements are all-reduced: splitting them would cost more than it saves


def build_optimizer(
    model: GPT, *, unembedding_lr: float, embedding_lr: float, matrix_lr: float, scalar_lr: float, weight_decay: float
) -> "MuonAdamW":
    """Groups the model's parameters by kind and rate. AdamW rates of tables shrink with width as (C/768)^-1/2."""
    s = (model.config.n_embd / 768) ** -0.5
    named = dict(model.named_parameters())

    def adamw(names, lr, betas, weight_decay):
        params = [(name, named[name]) for name in names]
        return {"params": params, "kind": "adamw", "lr": lr, "betas": betas, "weight_decay": weight_decay}

    groups = [
        adamw(["lm_head.weight"], unembedding_lr * s, (0.8, 0.96), 0.01),
        adamw(["transformer.wte.weight"], embedding_lr * s, (0.8, 0.995), 0.001),
        adamw([n for n in named if n.startswith("value_embeds.")], 0.5 * embedding_lr * s, (0.8, 0.995), 0.01),
        adamw(["resid_lambdas"], 0.01 * scalar_lr, (0.8, 0.95), 0.05),
        adamw(["x0_lambdas"], scalar_lr, (0.96, 0.95), 0.0),
        adamw(["smear_gate.weight", "smear_lambda", "backout_lambda"], 0.2, (0.8, 0.95), 0.0),
    ]
    matrices = [(name, p) for name, p in named.items() if name.startswith("transformer.h.")]
    for shape in sorted({p.shape for _, p in matrices}):
        params = [(name, p) for name, p in matrices if p.shape == shape]
        groups.append(
            {"params": params, "kind": "muon", "lr": matrix_lr, "momentum": 0.95, "weight_decay": weight_decay}
        )
    return MuonAdamW(groups, matmul_dtype=model.compute_dtype)


def adamw_update(p, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay) -> None:
    """One AdamW step in place (arXiv:1711.05101), in fp32 whatever the dtype of p."""
    grad = grad.float()
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt_().add_(eps)
    new = p.float() * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * exp_avg / denominator
    p.copy_(new)


def orthogonalize(u: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices to u (n, r, c), by Polar Express (arXiv:2505.16932) in `dtype`."""
    X = (u / (1.01 * u.norm(dim=(-2, -1), keepdim=True) + 1e-6)).to(dtype)
    tall = X.size(-2) > X.size(-1)
    for a, b, c in POLAR_EXPRESS:  # always multiply on the smaller side
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X.float()


def muon_update(p, grad, momentum_buffer, second_moment, *, lr, momentum, weight_decay, matmul_dtype) -> None:
    """One Muon step in place on stacked matrices p (n, r, c), in fp32 but for the orthogonalization.

    Nesterov momentum, rows equilibrated, orthogonalized, then NorMuon's per-neuron scale (arXiv:2510.05491) that
    keeps the update's norm, and cautious weight decay (arXiv:2411.16085): only where it agrees with the update.
    """
    r, c = p.shape[-2:]
    momentum_buffer.lerp_(grad, 1 - momentum)
    u = grad.lerp(momentum_buffer, momentum)

    row_norm = u.norm(dim=-1, keepdim=True)
    u = u * (u.norm(dim=(-2, -1), keepdim=True) / math.sqrt(r) / row_norm.clamp(min=1e-6))
    X = orthogonalize(u, matmul_dtype)
    # A zero gradient stays zero: at the first step most are, as the projections after them are initialized to zero.
    X = X * (math.sqrt(min(r, c)) / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))

    axis = -1 if r >= c else -2
    d = p.size(axis)
    q = X.square().mean(dim=axis, keepdim=True)
    second_moment.lerp_(q, 0.1)
    scale = second_moment.clamp(min=1e-10).rsqrt()
    norm_before = (d * q.sum(dim=(-2, -1), keepdim=True)).sqrt()
    norm_after = (d * (q * scale.square()).sum(dim=(-2, -1), keepdim=True)).sqrt()
    X = X * scale * (norm_before / norm_after.clamp(min=1e-10))

    lr = lr * max(1.0, r / c) ** 0.5
    agrees = X * p >= 0
    p.copy_(p - lr * X - lr * weight_decay * p * agrees)


class MuonAdamW(torch.optim.Optimizer):
    """Groups carry kind ("adamw" | "muon"), lr, initial_lr and, for muon, momentum and weight_decay."""

    def __init__(self, groups: list[dict], matmul_dtype: torch.dtype = torch.float32):
        super().__init__(groups, defaults={"eps": 1e-10})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
        self.matmul_dtype = matmul_dtype
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.shards = [shard for group in self.param_groups for shard in self._shards(group)]
        self._adamw, self._muon, self._scalar = adamw_update, muon_update, float
        if self.param_groups[0]["params"][0].is_cuda:
            self.compile_updates()

    def compile_updates(self, **options) -> None:
        """Compile the updates for each shape, as on GPUs: scalars that change are then tensors, or each new rate would
        be another program. options: of torch.compile. Not yet run."""
        self._adamw = compile_static(adamw_update, **options)
        self._muon = compile_static(muon_update, **options)
        self._scalar = torch.tensor

    def _shards(self, group: dict) -> list["Shard"]:
        named = list(zip(group["param_names"], group["params"], strict=True))
        if group["kind"] == "muon":
            return [Shard(group, dict(named), self.rank, self.world_size)]
        return [Shard(group, {name: p}, self.rank, self.world_size) for name, p in named]

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters. Takes their gradients: each is None afterwards, which frees memory for the next."""
        # All reductions start at once; each shard is updated as its gradient arrives, while later ones still travel.
        for shard in self.shards:
            shard.start_reduce()
        for shard in self.shards:
            p, grad = shard.finish_reduce()
            self._update(shard, p, grad)
            shard.start_gather(p)
        for shard in self.shards:
            shard.finish_gather()

    def _update(self, shard: "Shard", p: torch.Tensor, grad: torch.Tensor) -> None:
        group, state = shard.group, shard.state(p)
        if group["kind"] == "muon":
            options = {k: self._scalar(group[k]) for k in ("lr", "momentum", "weight_decay")}
            self._muon(
                p, grad, state["momentum_buffer"], state["second_moment"], matmul_dtype=self.matmul_dtype, **options
            )
        else:
            state["step"] += 1
            options = {k: group[k] for k in ("betas", "eps", "weight_decay")} | {"lr": self._scalar(group["lr"])}
            step = self._scalar(state["step"].item())
            self._adamw(p, grad, state["exp_avg"], state["exp_avg_sq"], step, **options)

    def shard_state(self) -> dict[str, tuple[int, torch.Tensor]]:
        """This rank's part of the state: "parameter|state name" -> (first row, rows), for a checkpoint.

        Whole tensors (Muon's matrices, small tensors, step counts) have first row 0; ranks that hold the same
        small tensor leave it to rank 0.
        """
        return {key: value for shard in self.shards for key, value in shard.export().items()}

    def load_shard_state(self, read: Callable[[str], torch.Tensor]) -> None:
        """Takes this rank's part from `read("parameter|state name")`, which returns the whole, unsharded tensor."""
        for shard in self.shards:
            shard.load(read)


class Shard:
    """What one rank updates of one AdamW tensor or one stack of Muon matrices, and how it travels.

    A Muon group is split by matrices and a large AdamW tensor by rows, ⌈n/world⌉ to each rank, padded with zeros at
    the end; a small AdamW tensor is whole on every rank.
    """

    def __init__(self, group: dict, params: dict[str, torch.nn.Parameter], rank: int, world_size: int):
        self.group, self.params, self.rank, self.world_size = group, params, rank, world_size
        self.stacked = group["kind"] == "muon"
        first = next(iter(params.values()))
        self.replicated = not self.stacked and first.numel() < SMALL
        self.length = len(params) if self.stacked else first.size(0)
        self.chunk = self.length if self.replicated else math.ceil(self.length / world_size)
        self.start = 0 if self.replicated else rank * self.chunk
        self.stop = min(self.start + self.chunk, self.length)
        self.sent: torch.Tensor | None = None  # kept while it travels
        self._state: dict[str, torch.Tensor] = {}

    def _rows(self, tensors: list[torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """Rows of the shard's tensors along axis 0, with zeros for those past the end."""
        end = min(stop, self.length)
        if not self.stacked:
            rows = tensors[0][start:end]
        elif start < end:
            rows = torch.stack(tensors[start:end])
        else:
            rows = tensors[0].new_empty(0, *tensors[0].shape)
        padding = stop - start - len(rows)
        return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])]) if padding else rows

    def start_reduce(self) -> None:
        if missing := [name for name, p in self.params.items() if p.grad is None]:
            raise RuntimeError(f"no gradient for {missing[0]}: call backward before step")
        self.work = None
        if self.world_size == 1:
            return
        everything = self.length if self.replicated else self.chunk * self.world_size
        self.grad = self._take_gradients(0, everything)
        # gloo has no mean
        self.averages = dist.get_backend() == "nccl"
        op = dist.ReduceOp.AVG if self.averages else dist.ReduceOp.SUM
        if self.replicated:
            self.work = dist.all_reduce(self.grad, op, async_op=True)
        else:
            self.sent, self.grad = self.grad.contiguous(), self.grad.new_empty(self.chunk, *self.grad.shape[1:])
            self.work = dist.reduce_scatter_tensor(self.grad, self.sent, op, async_op=True)

    def _take_gradients(self, start: int, stop: int) -> torch.Tensor:
        gradients = self._rows([p.grad for p in self.params.values()], start, stop)
        for p in self.params.values():
            p.grad = None
        return gradients

    def finish_reduce(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's rows of the parameters, to be updated in place, and their mean gradient."""
        if self.work is not None:
            self.work.wait()
            self.sent = None
            self.grad = self.grad if self.averages else self.grad / self.world_size
        else:
            self.grad = self._take_gradients(0, self.length)
        return self._rows([p.detach() for p in self.params.values()], self.start, self.start + self.chunk), self.grad

    def start_gather(self, p: torch.Tensor) -> None:
        self.grad, self.work, self.gathered = None, None, p
        if self.world_size == 1:
            self.finish_gather()  # at once, so that no two stacks are held
        elif not self.replicated:
            self.gathered = p.new_empty(self.chunk * self.world_size, *p.shape[1:])
            self.work = dist.all_gather_into_tensor(self.gathered, p.contiguous(), async_op=True)

    def finish_gather(self) -> None:
        if self.gathered is None:
            return
        if self.work is not None:
            self.work.wait()
        params = [p.detach() for p in self.params.values()]
        parts = self.gathered.unbind(0)[: self.length] if self.stacked else [self.gathered[: self.length]]
        if params[0].data_ptr() != parts[0].data_ptr():  # else updated in place
            torch._foreach_copy_(params, list(parts))
        self.gathered = None

    def state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self._state:
            if self.stacked:
                n, r, c = p.shape
                self._state["momentum_buffer"] = torch.zeros_like(p)
                self._state["second_moment"] = p.new_zeros((n, r, 1) if r >= c else (n, 1, c))
            else:
                self._state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                self._state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                self._state["step"] = torch.zeros(1)
        return self._state

    def export(self) -> dict[str, tuple[int, torch.Tensor]]:
        if self.stacked:
            owned = list(self.params)[self.start : self.stop]
            return {f"{name}|{k}": (0, v[i]) for k, v in self._state.items() for i, name in enumerate(owned)}
        name = next(iter(self.params))
        held = {k: v if k == "step" else v[: max(self.stop - self.start, 0)] for k, v in self._state.items()}
        return {
            f"{name}|{k}": (0 if k == "step" else self.start, v)
            for k, v in held.items()
            if self.rank == 0 or not (self.replicated or k == "step")
        }

    def load(self, read: Callable[[str], torch.Tensor]) -> None:
        first = next(iter(self.params.values()))
        template = first.detach().new_zeros(self.chunk, *(first.shape if self.stacked else first.shape[1:]))
        for k, value in self.state(template).items():
            if self.stacked:
                for i, name in enumerate(list(self.params)[self.start : self.stop]):
                    value[i].copy_(read(f"{name}|{k}"))
            else:
                rows = read(f"{next(iter(self.params))}|{k}")
                rows = rows if k == "step" else rows[self.start : self.stop]
                value[: len(rows)].copy_(rows)

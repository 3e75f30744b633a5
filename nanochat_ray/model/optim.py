"""MuonAdamW: Muon for the matrices of the blocks, AdamW for everything else, sharded over the ranks (ZeRO-2).

The optimizer reduces gradients itself, so models are not wrapped in DDP. Each rank receives the mean gradient of the
parameters that it owns, updates them with the only copy of their state, and sends them to the others. Gradients are
sent while the backward still runs, and weights while the next forward runs. A single rank takes the same path and sends
nothing.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from nanochat_ray.model.compiling import compile_static
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.shards import Matrices, Shard, Table, make_shards

# Coefficients of five Polar Express steps (arXiv:2505.16932), safety factor 1.01.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

GATE_LR = 0.2  # learning rate of the smear gate, the smear lambda and the backout lambda


def build_optimizer(
    model: GPT,
    *,
    unembedding_lr: float,
    embedding_lr: float,
    matrix_lr: float,
    scalar_lr: float,
    weight_decay: float,
    gate_lr: float = GATE_LR,
) -> "MuonAdamW":
    """Return the model's optimizer, with parameters grouped by kind and learning rate.

    The AdamW rates of tables are scaled with the width by (C/768)^-1/2.
    """
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
        adamw(["smear_gate.weight", "smear_lambda", "backout_lambda"], gate_lr, (0.8, 0.95), 0.0),
    ]
    matrices = [(name, p) for name, p in named.items() if name.startswith("transformer.h.")]
    for shape in sorted({p.shape for _, p in matrices}):
        params = [(name, p) for name, p in matrices if p.shape == shape]
        groups.append(
            {"params": params, "kind": "muon", "lr": matrix_lr, "momentum": 0.95, "weight_decay": weight_decay}
        )
    return MuonAdamW(groups, model.compute_dtype)


def adamw_update(p, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay) -> None:
    """Do one AdamW step in place (arXiv:1711.05101), in fp32 for any dtype of p."""
    grad = grad.float()
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt_().add_(eps)
    new = p.float() * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * exp_avg / denominator
    p.copy_(new)


def orthogonalize(u: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Approximate the nearest (semi-)orthogonal matrices to u (n, r, c), by Polar Express (arXiv:2505.16932).

    Multiplies in `dtype` and returns fp32.
    """
    X = (u / (1.01 * u.norm(dim=(-2, -1), keepdim=True) + 1e-6)).to(dtype)
    tall = X.size(-2) > X.size(-1)
    for a, b, c in POLAR_EXPRESS:  # A and B have the size of the smaller side
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X.float()


def muon_update(p, grad, momentum_buffer, second_moment, *, lr, momentum, weight_decay, matmul_dtype) -> None:
    """Do one Muon step in place on stacked matrices p (n, r, c), in fp32 except for the orthogonalization.

    The steps are Nesterov momentum, scaling of rows to one norm, orthogonalization, and NorMuon's scale per neuron
    (arXiv:2510.05491), which keeps the update's norm. Weight decay is cautious (arXiv:2411.16085): it applies only
    where the update and the weight have the same sign.
    """
    r, c = p.shape[-2:]
    momentum_buffer.lerp_(grad, 1 - momentum)
    u = grad.lerp(momentum_buffer, momentum)

    row_norm = u.norm(dim=-1, keepdim=True)
    u = u * (u.norm(dim=(-2, -1), keepdim=True) / math.sqrt(r) / row_norm.clamp(min=1e-6))
    X = orthogonalize(u, matmul_dtype)
    # The clamp keeps a zero gradient zero. At the first step most gradients are zero, because the projections after
    # these matrices are initialized to zero.
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
    """Muon and AdamW over groups as build_optimizer() makes them. A group's kind is "adamw" or "muon".

    compute_dtype: of matmuls, in Muon and in the forward. A rank has the weights of others rounded to this dtype.
    """

    # Skip PyTorch's decorator of these methods: it imports Dynamo, which takes two seconds even if nothing is compiled.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, groups: list[dict], compute_dtype: torch.dtype = torch.float32):
        super().__init__(groups, defaults={"eps": 1e-10})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
        self.compute_dtype = compute_dtype
        distributed = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.shards = make_shards(self.param_groups, rank, world_size, compute_dtype)
        self.to_reduce = self.shards  # shards whose gradients are not sent yet in this step
        self.to_gather: list[Matrices | Table] = []  # after a step: shards whose weights are still being sent
        self.in_backward, self.in_forward = False, False
        if world_size > 1:
            for shard in self.shards:
                for p in shard.params.values():
                    p.register_post_accumulate_grad_hook(partial(self._has_gradient, shard))
        self._adamw, self._muon, self._scalar = adamw_update, muon_update, float
        if self.param_groups[0]["params"][0].is_cuda:
            self.compile_updates()

    def compile_updates(self, **options) -> None:
        """Compile the updates for each shape. This is the default on GPUs.

        Scalars that change become tensors, because each new learning rate would otherwise compile another graph.
        options: of torch.compile.
        """
        self._adamw = compile_static(adamw_update, **options)
        self._muon = compile_static(muon_update, **options)
        self._scalar = torch.tensor

    def overlap(self, model: GPT) -> None:
        """Let step() return while weights are still being sent. The model's forward waits for those of each layer.

        Call wait() before anything else reads the weights.
        """
        self.in_forward, model.wait_for_weights = True, self.wait

    def reduce_in_backward(self) -> None:
        """Send each shard's gradients as soon as they are complete. Call it before the last backward of a step."""
        self.in_backward = True
        for shard in self.shards:
            shard.waiting_for = set(shard.params.values())

    def _has_gradient(self, shard: Shard, p: torch.nn.Parameter) -> None:
        if not self.in_backward:
            return
        shard.waiting_for.discard(p)
        # Start shards in a fixed order: all ranks must call collectives in the same order.
        while self.to_reduce and not self.to_reduce[0].waiting_for:
            self.to_reduce[0].start_reduce()
            self.to_reduce = self.to_reduce[1:]

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters. Sets their gradients to None, which frees memory for the next ones."""
        for shard in self.to_reduce:
            shard.start_reduce()
        self.to_reduce, self.in_backward = self.shards, False
        self.to_gather = self.shards[::-1]  # in the order in which the forward reads them
        for shard in self.to_gather:
            self._update(shard, shard.finish_reduce())
            shard.start_gather()
        if not self.in_forward:
            self.wait()

    def _update(self, shard: Matrices | Table, gradients: list) -> None:
        owned = shard.owned()
        if isinstance(shard, Matrices):
            for group, stack, state in zip(shard.groups, shard.stacks, shard.state, strict=True):
                options = {k: self._scalar(group[k]) for k in ("lr", "momentum", "weight_decay")}
                p, grad = (torch.stack([tensors[i] for i in stack]) for tensors in (owned, gradients))
                for i in stack:
                    gradients[i] = None  # free its memory for the update
                self._muon(
                    p,
                    grad,
                    state["momentum_buffer"],
                    state["second_moment"],
                    matmul_dtype=self.compute_dtype,
                    **options,
                )
                torch._foreach_copy_([owned[i] for i in stack], list(p.unbind()))
        else:
            shard.state["step"] += 1
            group = shard.group
            options = {k: group[k] for k in ("betas", "eps", "weight_decay")} | {"lr": self._scalar(group["lr"])}
            step = self._scalar(shard.state["step"].item())
            moments = shard.state["exp_avg"], shard.state["exp_avg_sq"]
            if owned[0].numel():  # the last of many ranks may own no rows
                self._adamw(*owned, *gradients, *moments, step, **options)

    @torch.no_grad()
    def wait(self, layer: float = math.inf) -> None:
        """Wait for the weights that the forward reads up to and including this layer, by default for all weights."""
        while self.to_gather and self.to_gather[0].layer <= layer:
            self.to_gather.pop(0).finish_gather()

    @torch.no_grad()
    def gather_exactly(self) -> None:
        """Gather all weights unrounded on every rank, as a checkpoint stores them. Every rank must call this."""
        self.wait()
        rounded = [shard for shard in self.shards if shard.read_dtype != shard.dtype]
        for shard in rounded:
            shard.start_gather(shard.dtype)
            shard.finish_gather()

    def shard_state(self) -> dict[str, tuple[int, torch.Tensor]]:
        """Return this rank's part of the state for a checkpoint: "parameter|state name" -> (first row, rows).

        Whole tensors (Muon's matrices, small tensors, step counts) have first row 0. Only rank 0 returns the tensors
        that are the same on all ranks.
        """
        return {key: value for shard in self.shards for key, value in shard.export().items()}

    def load_shard_state(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        """Load this rank's part. `read("parameter|state name", start, stop)` returns rows of the unsharded tensor."""
        for shard in self.shards:
            shard.load(read)

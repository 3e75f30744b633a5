"""MuonAdamW: Muon for the matrices of the blocks, AdamW for everything else, sharded over the ranks (ZeRO-2).

The optimizer reduces gradients itself, so models are not wrapped in DDP: each rank receives the mean gradient of what
it owns, updates that with the only copy of its state, and sends it to the others. Gradients travel while the backward
still runs, and weights while the next forward does. One rank takes the same path with nothing to send.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from nanochat_ray.model.compiling import compile_static
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.shards import Matrices, Shard, make_shards

# Coefficients of five Polar Express steps (arXiv:2505.16932), safety factor 1.01.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

GATE_LR = 0.2  # of the smear gate, the smear lambda and the backout lambda


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
    """Groups carry kind ("adamw" | "muon"), lr, initial_lr and, for muon, momentum and weight_decay.

    compute_dtype: of Muon's matmuls, and of the forward's. Where a rank does not own a weight, it has it in this dtype.
    """

    # torch's own decorator of these imports Dynamo, two seconds of a start that compiles nothing.
    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__

    def __init__(self, groups: list[dict], compute_dtype: torch.dtype = torch.float32):
        super().__init__(groups, defaults={"eps": 1e-10})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
        self.compute_dtype = compute_dtype
        distributed = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.shards = make_shards(self.param_groups, rank, world_size, compute_dtype)
        self.to_reduce = self.shards  # this step's shards that have not started
        self.to_gather: list[Shard] = []  # after a step: those whose weights still travel
        self.in_backward, self.in_forward = False, False
        if world_size > 1:
            for shard in self.shards:
                for p in shard.params.values():
                    p.register_post_accumulate_grad_hook(partial(self._has_gradient, shard))
        self._adamw, self._muon, self._scalar = adamw_update, muon_update, float
        if self.param_groups[0]["params"][0].is_cuda:
            self.compile_updates()

    def compile_updates(self, **options) -> None:
        """Compile the updates for each shape, as on GPUs: scalars that change are then tensors, or each new rate would
        be another program. options: of torch.compile."""
        self._adamw = compile_static(adamw_update, **options)
        self._muon = compile_static(muon_update, **options)
        self._scalar = torch.tensor

    def overlap(self, model: GPT) -> None:
        """Let step() return while weights still travel. The model's forward waits for those of each layer; anything
        else that reads them has to wait() first."""
        self.in_forward, model.wait_for_weights = True, self.wait

    def reduce_in_backward(self) -> None:
        """Call it before the last backward of a step: each shard's gradients are sent as soon as they are there."""
        self.in_backward = True
        for shard in self.shards:
            shard.waiting_for = set(shard.params.values())

    def _has_gradient(self, shard: Shard, p: torch.nn.Parameter) -> None:
        if not self.in_backward:
            return
        shard.waiting_for.discard(p)
        # Shards start in one order, as all ranks must send the same at the same time.
        while self.to_reduce and not self.to_reduce[0].waiting_for:
            self.to_reduce[0].start_reduce()
            self.to_reduce = self.to_reduce[1:]

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters. Takes their gradients: each is None afterwards, which frees memory for the next."""
        for shard in self.to_reduce:
            shard.start_reduce()
        self.to_reduce, self.in_backward = self.shards, False
        self.to_gather = self.shards[::-1]  # in the order in which the forward reads them
        for shard in self.to_gather:
            self._update(shard, shard.finish_reduce())
            shard.start_gather()
        if not self.in_forward:
            self.wait()

    def _update(self, shard: Shard, gradients: list[torch.Tensor]) -> None:
        owned = shard.owned()
        if isinstance(shard, Matrices):
            for group, stack, state in zip(shard.groups, shard.stacks, shard.state, strict=True):
                options = {k: self._scalar(group[k]) for k in ("lr", "momentum", "weight_decay")}
                p, grad = (torch.stack([tensors[i] for i in stack]) for tensors in (owned, gradients))
                for i in stack:
                    gradients[i] = None  # their memory is free for the update
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
            if owned[0].numel():  # with many ranks the last may have no rows
                self._adamw(*owned, *gradients, *moments, step, **options)

    @torch.no_grad()
    def wait(self, layer: float = math.inf) -> None:
        """Until the weights have arrived that the forward reads up to this layer: by default all of them."""
        while self.to_gather and self.to_gather[0].layer <= layer:
            self.to_gather.pop(0).finish_gather()

    @torch.no_grad()
    def gather_exactly(self) -> None:
        """Have all weights in their own dtype on every rank, as a checkpoint keeps them. Every rank calls this."""
        self.wait()
        coarse = [shard for shard in self.shards if shard.read_dtype != shard.dtype]
        for shard in coarse:
            shard.start_gather(shard.dtype)
            shard.finish_gather()

    def shard_state(self) -> dict[str, tuple[int, torch.Tensor]]:
        """This rank's part of the state: "parameter|state name" -> (first row, rows), for a checkpoint.

        Whole tensors (Muon's matrices, small tensors, step counts) have first row 0; what all ranks hold alike is left
        to rank 0.
        """
        return {key: value for shard in self.shards for key, value in shard.export().items()}

    def load_shard_state(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        """Takes this rank's part from `read("parameter|state name", start, stop)`: rows of the unsharded tensor."""
        for shard in self.shards:
            shard.load(read)

"""REINFORCE over sampled tokens: answers and their advantages -> gradients of the policy.

The loss is −Σ advantage · log π(token) over the tokens that the model sampled. The forward reads each question once,
not once for each answer to it: the answers attend to its keys and values.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanochat_ray.inference.sampling import GREEDY, SamplingParams
from nanochat_ray.model.attention import attend_visible, sliding_window_mask
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.loss import LOGIT_SOFTCAP, add_product_, chunk_size, softcap
from nanochat_ray.train.loop import Worker

MOST_RATIO = 2.0  # largest ratio of probabilities, where answers are older than the weights
CPU_CHUNK_LOGITS = 2**20  # held at once in the loss, so that they stay in a CPU's caches


@dataclass(frozen=True)
class Answer:
    """prompt: the question's token ids. ids: the answer's, including the one that ended it. For each id of the answer:
    drawn is 1 if it was sampled, else 0; logprobs has the log probability in nats that it was sampled with."""

    prompt: list[int]
    ids: list[int]
    drawn: list[int]
    logprobs: list[float]
    text: str
    reward: float
    cut: bool  # at max_new_tokens

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)


def advantages_of(groups: list[list[Answer]], by_std: bool) -> list[float]:
    """Of each answer: its reward minus the mean of its question's."""
    advantages = []
    for group in groups:
        rewards = np.array([answer.reward for answer in group])
        centered = rewards - rewards.mean()
        advantages += (centered / (rewards.std() + 1e-6) if by_std else centered).tolist()
    return advantages


@dataclass
class Trained:
    """What this rank learned from. sums: tokens that were sampled, tokens that the model read, and over the sampled
    ones entropy, log μ − log π in nats, and how many ratios were cut."""

    loss: torch.Tensor
    sums: list[float]
    mismatch_max: float = 0.0


def learn(
    worker: Worker, answers: list[Answer], advantages: list[float], params: SamplingParams, count: float, stale: bool
) -> Trained:
    """Gradients of −Σ advantage · log π(token) / count, by micro-batches. Answers without advantage have none.

    params: what the answers were sampled with.
    """
    c, model = worker.config, worker.model
    kept = [i for i, advantage in enumerate(advantages) if advantage] or [0]
    budget = c.device_batch_size * model.config.sequence_len
    batches = list(micro_batches([(answers[i], advantages[i]) for i in kept], budget))
    trained = Trained(torch.zeros((), device=worker.device), [0.0] * 5)
    for i, (chosen, of_each) in enumerate(batches):
        loss, sums, mismatch_max = policy_loss(model, chosen, of_each, params, stale)
        if i == len(batches) - 1:
            worker.optimizer.reduce_in_backward()
        (loss * (worker.world_size / count)).backward()  # the optimizer takes the mean over ranks
        trained.loss += loss.detach()
        trained.sums = [a + b for a, b in zip(trained.sums, sums, strict=True)]
        trained.mismatch_max = max(trained.mismatch_max, mismatch_max)
    return trained


def micro_batches(pairs: list[tuple[Answer, float]], budget: int) -> Iterator[tuple[list[Answer], list[float]]]:
    """Yield answers with their advantages, those of like length together. A batch has at most `budget` padded tokens,
    counting each answer's question."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0].ids), reverse=True)
    longest_prompt = max(len(answer.prompt) for answer, _ in pairs)
    while pairs:
        rows = max(1, budget // (longest_prompt + len(pairs[0][0].ids)))
        answers, advantages = zip(*pairs[:rows], strict=True)
        yield list(answers), list(advantages)
        pairs = pairs[rows:]


class SharedPrompts:
    """The `cache` of one model.hidden call over idx (1, N): G different prompts, and A answers without their last ids.

    Prompts (G, P) are padded on the left, answers (A, R) on the right. of_each (A,): the prompt of each answer.
    at (1, N): the position of each token in its sequence. previous (1, N): the id before it. ids (A, R + 1): the
    answers with their last ids.
    """

    def __init__(self, answers: list[Answer], device: torch.device):
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(answer.prompt) for answer in answers))}
        lengths = torch.tensor([len(prompt) for prompt in index], device=device)
        self.of_each = torch.tensor([index[tuple(answer.prompt)] for answer in answers], device=device)
        prompts = padded(list(index), torch.long, device, left=True)
        self.ids = padded([answer.ids for answer in answers], torch.long, device)
        read = self.ids[:, :-1]
        (self.G, self.P), (self.A, self.R) = prompts.shape, read.shape
        self.choice = F.one_hot(self.of_each, self.G)  # (A, G)
        self.idx = self._join(prompts, read)
        before = torch.cat([prompts[self.of_each, -1:], read], dim=1)[:, : self.R]
        self.previous = self._join(F.pad(prompts, (1, -1)), before)
        self.places = torch.arange(self.P, device=device) - (self.P - lengths).unsqueeze(1)  # below 0 in the padding
        self.answer_places = lengths[self.of_each].unsqueeze(1) + torch.arange(self.R, device=device)
        self.at = self._join(self.places.clamp(min=0), self.answer_places)
        self.count = sum(map(len, index)) + sum(len(answer.ids) for answer in answers)  # tokens without padding
        self.masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _join(self, of_prompts: torch.Tensor, of_answers: torch.Tensor) -> torch.Tensor:
        return torch.cat([of_prompts.flatten(0, 1), of_answers.flatten(0, 1)]).unsqueeze(0)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, N, …) -> (G, P, …) and (A, R, …)."""
        prompts, answers = x[0].split([self.G * self.P, self.A * self.R])
        return prompts.unflatten(0, (self.G, self.P)), answers.unflatten(0, (self.A, self.R))

    def of_answers(self, x: torch.Tensor) -> torch.Tensor:
        """Return the row of each answer's prompt: (G, …) -> (A, …). It is a product, so its gradient is one, too."""
        return (self.choice.to(x.dtype) @ x.flatten(1)).unflatten(1, x.shape[1:])

    def visible(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether each token sees each key: (G, P, P) for prompts, and (A, R, P + R) for answers, whose keys are
        their prompt's and their own."""
        if window not in self.masks:
            keys, own = self.places, self.answer_places
            real, itself = (keys >= 0).unsqueeze(1), torch.eye(self.P, dtype=torch.bool, device=keys.device)
            # Padding sees itself, so that its weights don't sum to 0.
            prompts = sliding_window_mask(keys, keys, window) & real | itself
            answers = sliding_window_mask(own, torch.cat([keys[self.of_each], own], dim=1), window)
            answers[:, :, : self.P] &= real[self.of_each]
            self.masks[window] = prompts, answers
        return self.masks[window]

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """q (1, N, H, D) attends to k and v (1, N, K, D) within the window. Returns (1, N, H, D)."""
        (q, own_q), (k, own_k), (v, own_v) = map(self.split, (q, k, v))
        own_k, own_v = (torch.cat([self.of_answers(x), own], dim=1) for x, own in ((k, own_k), (v, own_v)))
        visible, own_visible = self.visible(window)
        y = attend_visible(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible)
        own_y = attend_visible(own_q.transpose(1, 2), own_k.transpose(1, 2), own_v.transpose(1, 2), own_visible)
        return self._join(y.transpose(1, 2), own_y.transpose(1, 2))


def padded(rows: Sequence[Sequence], dtype: torch.dtype, device: torch.device, left: bool = False) -> torch.Tensor:
    """(rows, length of the longest), with zeros after each row or before it."""
    longest = max(map(len, rows))
    zeros = [[0] * (longest - len(row)) for row in rows]
    joined = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, zeros, strict=True)]
    return torch.tensor(joined, dtype=dtype, device=device)


def policy_loss(
    model: GPT, answers: list[Answer], advantages: list[float], params: SamplingParams, stale: bool
) -> tuple[torch.Tensor, list[float], float]:
    """−Σ advantage · log π(token), in nats, over the tokens that were sampled; its sums, and the largest mismatch.

    Where answers are stale, each term is multiplied by min(π/μ, 2), not differentiated: μ is the probability that the
    engine sampled the token with, and π that of now, after temperature and top_k too.
    """
    device, shared = model.cos.device, SharedPrompts(answers, model.cos.device)
    drawn = padded([answer.drawn for answer in answers], torch.bool, device)
    mu = padded([answer.logprobs for answer in answers], torch.float32, device)[drawn]
    advantage = torch.tensor(advantages, dtype=torch.float32, device=device).unsqueeze(1).expand(drawn.shape)[drawn]
    of_prompts, of_answers = shared.split(model.hidden(shared.idx, shared))
    before = torch.cat([shared.of_answers(of_prompts[:, -1:]), of_answers], dim=1)  # each token comes after one
    head = model.lm_head.weight[: model.config.vocab_size]
    tokens = shared.ids[drawn]
    loss, now, entropy = _PolicyLoss.apply(before[drawn], head, tokens, mu if stale else None, advantage, params)
    mismatch = torch.where(now.isfinite(), mu - now, 0)  # where top_k does not leave the token out now
    cut = ((now - mu).exp() > MOST_RATIO).sum().item() if stale else 0.0
    sums = [float(len(tokens)), shared.count, entropy.sum().item(), mismatch.sum().item(), cut]
    return loss, sums, mismatch.abs().max().item()


class _PolicyLoss(torch.autograd.Function):
    """The loss (), with gradients for hidden states (N, C) and the head (V, C), and two figures of each token (N,): the
    log probability that it would be sampled with now, and the entropy of the model's own distribution, in nats.

    A chunk's gradients are taken while its logits are there. The logits of a whole batch are never held.
    """

    @staticmethod
    def forward(ctx, hidden, head, tokens, mu, advantages, params):
        ctx.gradients = grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        loss, now, entropy = torch.empty((3, len(tokens)), dtype=torch.float32, device=hidden.device)
        weight = head.to(hidden.dtype)
        size = chunk_size(len(head), True) if hidden.is_cuda else max(1, CPU_CHUNK_LOGITS // len(head))
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            x, own = hidden[part], tokens[part].unsqueeze(-1)
            logits = softcap(x @ weight.T)
            logs = logits.log_softmax(-1)
            of_own = logs.gather(-1, own)
            now[part] = sampled_with(logs, of_own, params)
            factor = advantages[part]
            if mu is not None:
                factor = factor * (now[part] - mu[part]).exp().clamp(max=MOST_RATIO)
            loss[part] = -factor * of_own.squeeze(-1)
            gradient = logs.exp()
            entropy[part] = -logs.mul_(gradient).sum(-1)
            slope = logits.square_().mul_(-1 / LOGIT_SOFTCAP**2).add_(1)  # of the softcap
            gradient.scatter_add_(-1, own, torch.full_like(of_own, -1))
            gradient = gradient.mul_(slope).mul_(factor.unsqueeze(-1)).to(x.dtype)
            torch.mm(gradient, weight, out=grad_hidden[part])
            add_product_(grad_head, gradient.T, x)
        ctx.mark_non_differentiable(now, entropy)
        return loss.sum(), now, entropy

    @staticmethod
    def backward(ctx, grad, *_):
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # scaled in place, so they serve once
        return grad_hidden.mul_(grad), grad_head.mul_(grad), None, None, None, None


def sampled_with(logs: torch.Tensor, of_own: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The log probability (N,) that a token is sampled with, of the model's own: all (N, V), and the token's (N, 1).
    -inf where top_k leaves it out; a tie leaves none out."""
    temperature = max(params.temperature, GREEDY)
    likeliest = logs.topk(min(params.top_k, logs.size(-1))).values if params.top_k else logs
    now = of_own / temperature - (likeliest / temperature).logsumexp(-1, keepdim=True)
    return (now.masked_fill(of_own < likeliest[:, -1:], -math.inf) if params.top_k else now).squeeze(-1)

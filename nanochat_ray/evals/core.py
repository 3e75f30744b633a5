"""CORE, the score of a base model (DCLM, arXiv:2406.11794): accuracy over few-shot tasks, centered on guessing.

An example takes one row of one forward pass, however many choices it has. The row holds the tokens that all choices
begin with, then the rest of each choice; the choices do not attend to each other. Rows of similar length share a
forward pass.
"""

import copy
import csv
import io
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise

import numpy as np
import ray
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.util import ActorPool

from nanochat_ray import storage
from nanochat_ray.data.tokenizer import PATTERN, Tokenizer
from nanochat_ray.evals import bundle
from nanochat_ray.evals.bundle import Task
from nanochat_ray.measuring import measuring
from nanochat_ray.model.attention import attention, sliding_window_mask
from nanochat_ray.model.gpt import GPT
from nanochat_ray.train.checkpoint import load_model
from nanochat_ray.train.hosts import until_started
from nanochat_ray.train.loop import Measurement

SHOTS_SEED = 1234
FORWARD_TOKENS = {"cuda": 2**16, "cpu": 2**12}  # per forward pass, with padding; a single row may be longer
MAX_LOGITS = 2**25  # computed at once: 128 MB of fp32


@dataclass
class CoreOptions:
    checkpoint: str
    """Folder of the checkpoint, or a run folder, whose newest checkpoint is used."""
    bundle: str | None = None
    """Folder of a CORE bundle. Default: the published one, which is downloaded once."""
    max_per_task: int = -1
    """Examples per task, the first after shuffling; -1 for all."""
    tasks: list[str] | None = None
    """Only these tasks. The score is then their mean."""
    actors: int = 0
    """Number of Ray actors that share the work. Each has a copy of the weights and a GPU, or a CPU if the cluster has
    no GPUs. 0: this process alone, on all CPUs."""
    out: str | None = None
    """Folder for core.csv and core_examples.jsonl. Default: the folder given as --checkpoint."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of this process. An actor uses a GPU if the cluster has one."""
    dtype: str | None = None
    """float32 or bfloat16. Default: bfloat16 if the hardware is fast at it."""


@dataclass
class CoreInTraining:
    core_every: int = 0
    """Steps between CORE scores. The last step is scored, too. 0 for none."""
    core_max_per_task: int = 500
    """Examples per task in these scores; -1 for all."""
    bundle: str | None = None
    """Folder of a CORE bundle, on a disk that all workers see. Default: the published one, which is downloaded once."""


@dataclass
class CoreResult:
    """Per task: accuracy, centered accuracy (guessing is 0, perfection is 1), and the examples in shuffled order.

    An example is {correct, gold, pred, mean_losses}, with the mean loss of each choice in nats per token. In
    language_modeling it is {correct, len, start}: its number of tokens, and the index where its continuation starts.
    """

    accuracy: dict[str, float] = field(default_factory=dict)
    centered: dict[str, float] = field(default_factory=dict)
    examples: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def core_metric(self) -> float:
        return sum(self.centered.values()) / len(self.centered)

    def metrics(self) -> dict[str, float]:
        """Return the score and the accuracies by their names in a run's log."""
        return {"core_metric": self.core_metric} | {f"core/{task}": a for task, a in self.accuracy.items()}


def run(options: CoreOptions) -> CoreResult:
    """Evaluate a checkpoint and write its files. Raises OSError or ValueError if something is missing or damaged."""
    folder = options.bundle or bundle.fetch()
    if options.actors:  # load the weights on the CPU, and send them to the actors
        on_gpus = "GPU" in ray.cluster_resources()
        device, dtype = "cpu", options.dtype or ("bfloat16" if on_gpus else None)
    else:
        device, dtype = options.device, options.dtype
    model, tokenizer, _ = load_model(options.checkpoint, device, dtype)
    result = evaluate_core(model, tokenizer, folder, options.max_per_task, options.tasks, options.actors)
    with measuring("writing core.csv"):
        save(result, options.out or options.checkpoint)
    return result


def in_training(options: CoreInTraining) -> Measurement | None:
    """Return the CORE measurement for pretrain.run, or None if core_every is 0.

    Raises OSError or ValueError if the bundle is missing or damaged."""
    if options.core_every <= 0:
        return None
    folder = storage.absolute(options.bundle) if options.bundle else bundle.fetch()
    bundle.read_tasks(folder, options.core_max_per_task)  # fail before the training if the bundle is damaged
    return Measurement(options.core_every, partial(measure, folder, options.core_max_per_task), "CORE")


def measure(bundle_dir: str, max_per_task: int, model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
    return evaluate_core(model, tokenizer, bundle_dir, max_per_task).metrics()


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    bundle_dir: str,
    max_per_task: int = -1,
    tasks: list[str] | None = None,
    actors: int = 0,
) -> CoreResult:
    """Return the CORE of a model, computed by `actors` Ray actors, or with 0 here, shared by all ranks.

    Raises FileNotFoundError or ValueError with the file of the bundle that is missing or damaged, and ValueError if the
    cluster has no room for the actors.
    """
    read = bundle.read_tasks(bundle_dir, max_per_task, tasks)
    score_all = Scorers(model, actors) if actors else partial(score_on_ranks, model)
    budget = FORWARD_TOKENS["cuda" if actors and "GPU" in ray.cluster_resources() else device_of(model).type]
    result = CoreResult()
    for task in read:
        began = time.perf_counter()
        items: list = build_items(task, tokenizer, model)
        batches = make_batches([(i, item) for i, item in enumerate(items) if item], budget)
        scores = {}
        for batch, batch_scores in zip(batches, score_all([[items[i] for i in b] for b in batches]), strict=True):
            scores |= zip(batch, batch_scores, strict=True)
        judged = [judge(task, i, item, scores[i]) if item else judge_too_long(task, i) for i, item in enumerate(items)]
        accuracy = sum(example["correct"] for example in judged) / len(judged)
        result.examples[task.name] = judged
        result.accuracy[task.name] = accuracy
        result.centered[task.name] = (accuracy - task.baseline) / (1 - task.baseline)
        if not dist.is_initialized() or dist.get_rank() == 0:
            rate = len(items) / (time.perf_counter() - began)
            if too_long := items.count(None):
                of = f"{too_long:,} of {len(items):,} examples"
                print(f"core {task.name:<32} {of} longer than the model's reach are counted as wrong", flush=True)
            print(f"core {task.name:<32} accuracy {accuracy:.4f} · {len(items)} examples · {rate:,.1f}/s", flush=True)
    return result


# From examples to tokens


@dataclass(frozen=True)
class Item:
    """An example in tokens (int32): the prefix that all choices share, then each distinct branch that continues it.

    For each choice, targets are the tokens to predict, and slots are the positions that predict them, as indices into
    the prefix followed by all branches. A branch lacks its choice's last token, which is only a target.
    """

    prefix: np.ndarray
    branches: list[np.ndarray]
    slots: list[np.ndarray]
    targets: list[np.ndarray]
    position: int  # rotary position of the prefix's first token
    length: int  # tokens of the first choice, with bos
    start: int  # index of its first target

    @property
    def branched(self) -> int:
        return sum(map(len, self.branches))


def build_items(task: Task, tokenizer: Tokenizer, model: GPT) -> list[Item | None]:
    """Return the tokens of each example after its shots, or None if a choice alone is longer than the model's reach."""
    examples = task.examples
    shots = [example.texts[example.gold] + "\n\n" for example in examples]
    prompts = []
    for i, example in enumerate(examples):
        before = [shots[j] for j in draw_shots(i, len(examples), task.shots)]
        prompts += [[*before, text] for text in example.texts]
        if example.opening is not None:
            opening = example.opening.rstrip()
            prompts.append([*before, opening] if opening else ["".join(before).rstrip()])
    ids = encode(tokenizer, prompts)
    items = []
    for example in examples:
        sequences = [next(ids) for _ in example.texts]
        if task.kind == "multiple_choice":
            starts = [common_prefix(sequences)] * len(sequences)
        elif task.kind == "schema":
            suffix = common_prefix([sequence[::-1] for sequence in sequences])
            starts = [max(1, len(sequence) - suffix) for sequence in sequences]
        else:
            starts = [common_prefix([*sequences, next(ids)])]
        items.append(build_item(sequences, starts, model))
    return items


def draw_shots(index: int, num_examples: int, shots: int) -> list[int]:
    """Return the indices of the examples to show before example `index`: all others if there are too few."""
    others = num_examples - 1
    drawn = random.Random(SHOTS_SEED + index).sample(range(others), min(shots, others))
    return [i + (i >= index) for i in drawn]


def encode(tokenizer: Tokenizer, prompts: list[list[str]]) -> Iterator[np.ndarray]:
    """Yield the token ids of each prompt, int32 with bos first. A prompt is a list of parts.

    A part that several prompts have is encoded once. The split pattern always cuts between the end of a line and a
    visible character, so parts that meet there have the same tokens as in the whole text. Other prompts are encoded
    whole.
    """

    def separable(parts: list[str]) -> bool:
        return tokenizer.pattern == PATTERN and all(a.endswith("\n") and b[:1].strip() for a, b in pairwise(parts))

    prompts = [parts if separable(parts) else ["".join(parts)] for parts in prompts]
    texts = list(dict.fromkeys(chain.from_iterable(prompts)))
    encoded = tokenizer.encode_batch(texts)
    ids = {text: np.array(tokens, dtype=np.int32) for text, tokens in zip(texts, encoded, strict=True)}
    bos = np.array([tokenizer.bos_id], dtype=np.int32)
    for parts in prompts:
        yield np.concatenate([bos, *(ids[part] for part in parts)])


def common_prefix(sequences: list[np.ndarray]) -> int:
    """Return the number of tokens that all sequences begin with."""
    length = min(map(len, sequences))
    differs = np.zeros(length + 1, dtype=bool)
    differs[length] = True
    for sequence in sequences[1:]:
        differs[:length] |= sequence[:length] != sequences[0][:length]
    return int(differs.argmax())


def build_item(sequences: list[np.ndarray], starts: list[int], model: GPT) -> Item | None:
    """Build one item from the choices' tokens. The targets of sequence i are its tokens from starts[i] on.

    The item omits the tokens of the prefix that no target can see: each layer looks back by its window, and the smear
    by one token. A sequence beyond the reach of rotary positions loses its beginning. Returns None if its part after
    the shared prefix is too long by itself.
    """
    shared = max(1, common_prefix([sequence[:-1] for sequence in sequences]))
    unseen = min(starts) - 1 - sum(model.config.window_sizes) - 1
    excess = max(0, max(map(len, sequences)) - 1 - model.cos.size(0))
    if excess >= shared:
        return None
    cut = min(max(excess, unseen), shared - 1)
    branches, offsets, slots, width = [], {}, [], 0
    for sequence, start in zip(sequences, starts, strict=True):
        branch = sequence[shared:-1]
        if branch.tobytes() not in offsets:  # equal choices share a branch: the losses are equal, and the first wins
            offsets[branch.tobytes()] = width
            branches.append(branch)
            width += len(branch)
        predicted_by = np.arange(max(start - 1, cut), len(sequence) - 1)
        at = np.where(predicted_by < shared, predicted_by, predicted_by + offsets[branch.tobytes()])
        slots.append(at - cut)
    targets = [sequence[len(sequence) - len(at) :] for sequence, at in zip(sequences, slots, strict=True)]
    return Item(sequences[0][cut:shared], branches, slots, targets, cut - excess, len(sequences[0]), starts[0])


def make_batches(items: list[tuple[int, Item]], budget: int) -> list[list[int]]:
    """Return batches of indices. Items of similar length share a batch of at most `budget` tokens, with padding.

    The longest come first. An item that is longer than the budget is a batch by itself.
    """
    order = sorted(items, key=lambda pair: (len(pair[1].prefix), pair[1].branched), reverse=True)
    batches, prefix, branched = [], 0, 0
    for i, item in order:
        prefix, branched = max(prefix, len(item.prefix)), max(branched, item.branched)
        if not batches or (len(batches[-1]) + 1) * (prefix + branched) > budget:
            batches.append([])
            prefix, branched = len(item.prefix), item.branched
        batches[-1].append(i)
    return batches


def judge_too_long(task: Task, index: int) -> dict:
    """Return the result of an example with a choice that is longer than the model's reach."""
    return {"correct": False, "gold": task.examples[index].gold, "pred": None, "mean_losses": []}


def judge(task: Task, index: int, item: Item, scores: list[tuple[float, bool]]) -> dict:
    """Return the result of an example. scores: per choice (mean loss, whether each target was the likeliest token)."""
    if task.kind == "language_modeling":
        return {"correct": scores[0][1], "len": item.length, "start": item.start}
    losses, gold = [loss for loss, _ in scores], task.examples[index].gold
    # If one choice is a prefix of all others, it has no tokens of its own and its loss is NaN. No comparison with NaN
    # holds, so the choice wins if it is the first and loses otherwise. Published scores were computed in this way.
    pred = min(range(len(losses)), key=losses.__getitem__)
    return {"correct": pred == gold, "gold": gold, "pred": pred, "mean_losses": losses}


# Running the model


def device_of(model: GPT) -> torch.device:
    return model.lm_head.weight.device


@torch.inference_mode()
def score(model: GPT, items: list[Item]) -> list[list[tuple[float, bool]]]:
    """Return for each choice of each item its mean loss, and whether every target was the most likely token."""
    packed = PackedItems(items, device_of(model))
    hidden = model.hidden(packed.idx, packed)
    targets = torch.from_numpy(np.concatenate([t for item in items for t in item.targets])).long().to(hidden.device)
    losses, likeliest = [], []
    chunk = max(1, MAX_LOGITS // model.config.vocab_size)
    for states, wanted in zip(hidden[packed.rows, packed.slots].split(chunk), targets.split(chunk), strict=True):
        logits = model.logits(states)
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        likeliest.append(logits.argmax(dim=-1) == wanted)
    losses, likeliest = torch.cat(losses).double().cpu().numpy(), torch.cat(likeliest).cpu().numpy()
    scores, end = [], 0
    for item in items:
        scores.append([])
        for target in item.targets:
            begin, end = end, end + len(target)
            mean = float(losses[begin:end].mean()) if len(target) else math.nan
            scores[-1].append((mean, bool(likeliest[begin:end].all())))
    return scores


class PackedItems:
    """Items as rows of one forward pass: the prefixes, padded to the longest, then each row's branches, padded as well.

    model.hidden takes it as `cache`. It gives the model the positions (at), the previous ids, and the attention. A
    branch continues its row's prefix and does not attend to other branches.
    """

    def __init__(self, items: list[Item], device: torch.device):
        self.prefix = max(len(item.prefix) for item in items)
        shape = (len(items), self.prefix + max(item.branched for item in items))
        idx, position = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        branch = np.full(shape, -1)  # number of a token's branch; 0 for the prefix, −1 for padding
        before = np.tile(np.arange(-1, shape[1] - 1), (shape[0], 1))
        for row, item in enumerate(items):
            length, at = len(item.prefix), self.prefix
            idx[row, :length], branch[row, :length] = item.prefix, 0
            position[row, :length] = item.position + np.arange(length)
            for number, tokens in enumerate(item.branches, 1):
                place = slice(at, at + len(tokens))
                idx[row, place], branch[row, place] = tokens, number
                position[row, place] = item.position + length + np.arange(len(tokens))
                before[row, at : at + 1] = length - 1
                at += len(tokens)
        previous = np.take_along_axis(idx, before.clip(min=0), axis=1)  # the entry of a first token is not used
        self.idx, self.at, self.branch, self.previous = (
            torch.from_numpy(array).to(device) for array in (idx, position, branch, previous)
        )
        shift = [np.where(s < len(i.prefix), s, s + self.prefix - len(i.prefix)) for i in items for s in i.slots]
        sizes = [sum(map(len, item.slots)) for item in items]
        self.slots = torch.from_numpy(np.concatenate(shift)).to(device)
        self.rows = torch.from_numpy(np.repeat(np.arange(len(items)), sizes)).to(device)
        self.masks = {}  # by window, because many layers have the same

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """Attend with q (B, T, H, D), k and v (B, T, K, D). Returns (B, T, H, D).

        Prefixes attend as in training. No real token attends to the padding after them."""
        P = self.prefix
        y = attention(q[:, :P], k[:, :P], v[:, :P], window)
        if q.size(1) == P:
            return y
        if window not in self.masks:
            same = self.branch[:, P:, None] == self.branch[:, None]
            near = sliding_window_mask(self.at[:, P:], self.at, window)
            self.masks[window] = (near & (same | (self.branch[:, None] == 0))).unsqueeze(1)
        q, k, v = q[:, P:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask, grouped = self.masks[window], q.size(1) != k.size(1)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return torch.cat([y, z.transpose(1, 2)], dim=1)


def score_on_ranks(model: GPT, batches: list[list[Item]]) -> list[list]:
    """Return the scores of the batches. With torch.distributed each rank scores a share, and every rank gets all."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    scores = {i: score(model, batches[i]) for i in range(rank, len(batches), world_size)}
    if world_size > 1:
        shares: list = [None] * world_size
        dist.all_gather_object(shares, scores)
        scores = {i: batch for share in shares for i, batch in share.items()}
    return [scores[i] for i in range(len(batches))]


@ray.remote(max_restarts=3, max_task_retries=3)
class Scorer:
    """Ray actor that scores batches with its own copy of the weights."""

    def __init__(self):
        torch.set_num_threads(1)  # rounding depends on the threads: with one, any number of actors gives the same sums
        self.model: GPT | None = None

    def started(self) -> None:
        pass

    def score(self, model: list[ray.ObjectRef], items: list[Item]) -> list:
        if self.model is None:  # each batch brings the reference, so a restarted actor finds its weights, too
            self.model = ray.get(model[0]).to("cuda" if ray.get_gpu_ids() else "cpu")
        return score(self.model, items)


class Scorers:
    """Ray actors that score batches. A free actor takes the next batch. The actors end with this object.

    Work begins when the first actor has started. The others join later, when the resources that they need are free.
    Raises ValueError if there are more actors than GPUs, or than CPUs in a cluster without GPUs.
    """

    def __init__(self, model: GPT, count: int):
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        if count > resources[kind]:
            raise ValueError(f"{count} actors on {resources[kind]:.0f} {kind}s: give at most one per {kind}")
        self.kind, self.count = kind, count
        self.model = ray.put(model if device_of(model).type == "cpu" else copy.deepcopy(model).cpu())
        # "DEFAULT": in a trial of a sweep they would be placed in the trial's placement group, which has no room.
        scorer = Scorer.options(num_cpus=1, num_gpus=1 if kind == "GPU" else 0, scheduling_strategy="DEFAULT")
        self.starting = {actor.started.remote(): actor for actor in (scorer.remote() for _ in range(count))}
        self.pool = ActorPool([])

    def __call__(self, batches: list[list[Item]]) -> Iterator[list]:
        if len(self.starting) == self.count:
            until_started(list(self.starting), "core", self.kind)
            self._admit()
        for items in batches:
            self.pool.submit(lambda actor, items: actor.score.remote([self.model], items), items)
        while self.pool.has_next():
            self._admit()
            yield self.pool.get_next()

    def _admit(self) -> None:
        """Add the actors that have started to the pool."""
        for started in ray.wait(list(self.starting), num_returns=len(self.starting), timeout=0)[0]:
            self.pool.push(self.starting.pop(started))


# Writing the results


def save(result: CoreResult, folder: str) -> None:
    """Write core.csv with a line per task and one for CORE, and core_examples.jsonl with a line per example."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["task", "examples", "accuracy", "centered"])
    for task, examples in result.examples.items():
        writer.writerow([task, len(examples), f"{result.accuracy[task]:.6f}", f"{result.centered[task]:.6f}"])
    writer.writerow(["CORE", sum(map(len, result.examples.values())), "", f"{result.core_metric:.6f}"])
    storage.write_bytes(storage.join(folder, "core.csv"), table.getvalue().encode())
    lines = []
    for task, examples in result.examples.items():
        for index, example in enumerate(examples):
            losses = [None if math.isnan(loss) else loss for loss in example.get("mean_losses", [])]  # JSON has no NaN
            example = example | {"mean_losses": losses} if losses else example
            lines.append(json.dumps({"task": task, "index": index, **example}))
    storage.write_bytes(storage.join(folder, "core_examples.jsonl"), "".join(f"{line}\n" for line in lines).encode())

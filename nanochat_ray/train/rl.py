"""Reinforcement learning: a chat model and a task that judges answers -> a model that answers better.

As in nanochat: a step asks some questions, each several times, and makes the answers likelier that got more reward than
the mean of their question's (REINFORCE with group means). The loss is the mean over all tokens that were sampled in the
step (DAPO, arXiv:2503.14476); there is no KL term, no clipping and no reference model. The loop is that of pretraining.
Answers come from the trainer's own engine, or from actors on other GPUs or CPUs.
"""

import json
import math
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import torch
import torch.distributed as dist

from nanochat_ray import machine, storage
from nanochat_ray.data.loader import Loader
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.inference.engine import GPU_MAX_PREFILL_TOKENS, MAX_PREFILL_TOKENS, Engine
from nanochat_ray.inference.kv_cache import cache_bytes
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.inference.sequence import Completion
from nanochat_ray.measuring import measuring, one_line
from nanochat_ray.model.compiling import why_not_compiled
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import GATE_LR
from nanochat_ray.model.scaling import BASE_LRS, flops_per_token
from nanochat_ray.train import checkpoint
from nanochat_ray.train.hosts import Request, alive
from nanochat_ray.train.launch import TrainResult, train
from nanochat_ray.train.loop import Learned, Measurement, TrainConfig, Worker, all_reduce, append_samples, due
from nanochat_ray.train.plan import GPU_ROWS
from nanochat_ray.train.policy_gradient import Answer, advantages_of, learn

LR_SCALE = 0.05  # of pretraining's base rates
# A run goes on only with the same values of these options.
OF_A_STEP = (
    "prompts_per_step", "num_samples", "max_new_tokens", "temperature", "top_k", "advantage_by_std", "staleness"
)  # fmt: skip
CPU_ROWS = 64  # most sequences that an engine decodes at once, as GPU_ROWS is
SHOWN_CHARS = 300  # of a question or an answer in samples.md


class Task(Protocol):
    """What the model is to learn. Pickled to the workers.

    A conversation is {"messages": […]} and more that the task needs; its last message, the reference answer, is not
    shown to the model. reward is given the answer as text, with tool calls and their outputs in it; right is 1.
    """

    train: Sequence[dict]
    val: Sequence[dict]

    def reward(self, conversation: dict, answer: str) -> float: ...


@dataclass
class RlOptions:
    checkpoint: str
    """Chat model to start from, or a run folder, of which the newest checkpoint is taken."""
    run: str | None = None
    """Name of the run folder; the default is the chat model's with -rl."""
    steps: int | None = None
    """Steps to train for; the default is one epoch: each question once."""
    prompts_per_step: int = 16
    """Questions of a step, over all workers."""
    num_samples: int = 16
    """Answers to each question."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Of the answers; the higher, the more they differ."""
    top_k: int | None = 50
    """Sample among this many likeliest tokens; 0 for all."""
    lr_factor: float = 1.0
    """Times the learning rates, 0.05 of the base rates of pretraining."""
    adamw_factor: float = 1.0
    """Times those of AdamW's parameters (embeddings, head, scalars). A step of AdamW does not shrink with the gradient.
    So with few answers per step it is mostly noise, and the answers become random. 0 keeps these parameters."""
    advantage_by_std: bool = False
    """Divide a question's advantages by the standard deviation of its rewards, as in GRPO (arXiv:2402.03300)."""
    rollout_workers: int = 0
    """Actors that answer, each on a GPU of its own where there are GPUs; 0 has the training workers answer themselves,
    between steps."""
    staleness: int = 0
    """1 asks the next step's questions while this step trains, by weights that are a step old. It needs
    --rollout-workers."""
    eval_every: int = 60
    """Steps between measurements of pass@1 and pass@k on held-out questions; 0 for the start and the end alone."""
    eval_questions: int = 400
    """Held-out questions in each."""
    eval_samples: int = 8
    """Answers to each of them: the k of pass@k."""
    device_batch_size: int | None = None
    """Most rows of sequence_len tokens in one forward pass of a training worker; the default is what fits."""
    workers: int | None = None
    """Most training workers; the default is every GPU that rollout workers leave, else one a host."""
    use_gpu: bool | None = None
    """Train on GPUs, for which the cluster is asked if it has none yet; the default is to if it has some."""
    wait_minutes: float = 10
    """How long to wait for hosts with room for all workers; then the run starts with fewer, and takes what comes."""
    save_every: int = 60
    """Steps between checkpoints; 0 for those before measurements and the end."""
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""
    recompute: bool = False
    """Activation checkpointing: for depths that don't fit; a third more work."""
    seed: int = 42
    """Of the order of questions, and of the answers."""


def run(options: RlOptions, task: Task) -> TrainResult:
    """Train on a task's questions, go on where the run's newest checkpoint stands, or return at once when it is done.

    The optimizer starts anew; rates fall linearly to 0; there is no weight decay.
    Raises FileNotFoundError without a checkpoint, ValueError for options that can't be, or not in this run folder.
    """
    o = options
    check(o, task)
    base = checkpoint.resolve_checkpoint(storage.absolute(o.checkpoint))
    meta = checkpoint.read_meta(base)
    steps = num_steps(o, task)
    inputs: dict = {name: getattr(o, name) for name in OF_A_STEP} | {
        "stage": "rl",
        "init_from": base,
        "questions": storage.fingerprint(*map(_as_json, task.train)),
        "model": meta["model_config"],
        "num_iterations": steps,
        "lrs": learning_rates(o.lr_factor, o.adamw_factor),
        "seed": o.seed,
    }
    config = TrainConfig(
        **{name: inputs[name] for name in ("stage", "init_from", "model", "num_iterations", "lrs", "seed")},
        run_dir=storage.join(storage.home(), "runs", o.run or f"{checkpoint.run_name(base)}-rl"),
        rows=None,
        tokenizer=base,
        total_batch_size=o.prompts_per_step * meta["model_config"]["sequence_len"],
        device_batch_size=o.device_batch_size,
        flops_per_token=flops_per_token(GPTConfig(**meta["model_config"])),
        weight_decay=0.0,
        eval_every=0,
        eval_tokens=0,
        sample_every=o.eval_every or max(1, steps // 4),
        save_every=o.save_every,
        prompts=[],
        dtype=o.dtype,
        compile=False,  # answers have many lengths, each of which would be compiled
        recompute=o.recompute,
        fp8=False,
    )
    policy = Policy(task, o)
    measurement = Measurement(o.eval_every or steps, policy.measure, "pass@k", first=True)
    request = Request(o.workers, o.use_gpu, o.wait_minutes, o.rollout_workers)
    return train(config, asdict(o) | {"inputs": inputs}, request, measurement, learn=policy)


def check(o: RlOptions, task: Task) -> None:
    """Raises ValueError for options that can't be."""
    if not task.train or not task.val:
        raise ValueError("the task has no questions: its `train` and `val` need one at least")
    for name in ("prompts_per_step", "max_new_tokens", "eval_questions", "eval_samples"):
        if getattr(o, name) < 1:
            raise ValueError(f"{name} {getattr(o, name)} must be 1 or more")
    if o.num_samples < 2:
        raise ValueError(f"num_samples {o.num_samples} must be 2 or more: an answer is compared to others")
    if o.staleness not in (0, 1):
        raise ValueError(f"staleness {o.staleness} must be 0 or 1")
    if o.staleness and not o.rollout_workers:
        raise ValueError("--staleness 1 needs --rollout-workers: the training workers can't answer while they train")


def num_steps(o: RlOptions, task: Task) -> int:
    return o.steps or math.ceil(len(task.train) / o.prompts_per_step)


def learning_rates(factor: float, of_adamw: float) -> dict[str, float]:
    """The arguments of build_optimizer: all base rates, and that of the gates, times LR_SCALE and the factors."""
    rates = {**BASE_LRS, "gate_lr": GATE_LR}
    return {name: factor * (1 if name == "matrix_lr" else of_adamw) * LR_SCALE * lr for name, lr in rates.items()}


def sampling(o: RlOptions) -> SamplingParams:
    return SamplingParams(o.max_new_tokens, o.temperature, o.top_k, for_training=True)


def _as_json(conversation: dict) -> str:
    return json.dumps(conversation, sort_keys=True, default=str)


class Question(NamedTuple):
    conversation: dict
    seed: int  # of its answers


@dataclass(frozen=True)
class Asked:
    """The answers to questions in order, a list each, and how they came about. Times in seconds."""

    answers: list[list[Answer]]
    version: int  # the step whose weights answered
    seconds: float  # of answering and judging
    sync: float  # to bring the weights to the engines
    waited: float = 0.0  # by the trainer, for the answers


class Asker:
    """Asks the questions of a task by an engine of its own."""

    def __init__(self, task: Task, options: RlOptions, tokenizer: Tokenizer, device: torch.device):
        self.task, self.o, self.tokenizer, self.device = task, options, tokenizer, device
        self.engine: Any = None  # an Engine, once weights arrived

    @torch.no_grad()
    def take_weights(self, model: GPT) -> None:
        """Of the one model that this is asked with, as they are now."""
        if self.engine:
            return self.engine.refresh_weights(model)
        on_gpu, o = self.device.type == "cuda", self.o
        rows = min(o.prompts_per_step * o.num_samples, GPU_ROWS if on_gpu else CPU_ROWS)
        longest = max(len(self.prompt(c)) for c in [*self.task.train, *self.task.val]) + o.max_new_tokens
        room = cache_bytes(model.config, rows, longest, model.compute_dtype.itemsize)
        chunk = GPU_MAX_PREFILL_TOKENS if on_gpu else MAX_PREFILL_TOKENS  # fixed: a resumed run has equal batches
        self.engine = Engine(model, self.tokenizer, rows, room, chunk)
        if on_gpu:
            self.engine.compile()
        elif why_not_compiled("cpu") is None:
            self.engine.compile_attention()  # the rest would be compiled again for the weights of each step

    def prompt(self, conversation: dict) -> list[int]:
        return self.tokenizer.render_for_completion({"messages": conversation["messages"][:-1]})

    def ask(self, questions: list[Question], num_samples: int) -> list[list[Answer]]:
        """num_samples answers to each question, with their rewards.

        Raises ValueError for a reward that fails, and when the model's output is not a number.
        """
        o, prompts = self.o, [self.prompt(conversation) for conversation, _ in questions]
        params = [replace(sampling(o), seed=seed, n=num_samples) for _, seed in questions]
        completions = self.engine.generate(prompts, params)
        of = [i for i in range(len(questions)) for _ in range(num_samples)]  # the question of each completion

        def answer(i: int, completion: Completion) -> Answer:
            text, reward = self._judge(questions[i][0], completion)
            tokens, drawn, logprobs = completion.tokens, completion.mask, completion.drawn_logprobs
            return Answer(prompts[i], tokens, drawn, logprobs, text, reward, completion.finish_reason == "length")  # ty: ignore[invalid-argument-type]

        with ThreadPoolExecutor(machine.available_cpus()) as pool:  # programs are judged side by side
            answers = list(pool.map(answer, of, completions))
        return [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]

    def _judge(self, conversation: dict, completion: Completion) -> tuple[str, float]:
        if completion.finish_reason == "error":
            raise ValueError("the model's output is not a number (NaN): lower --lr-factor")
        ended = completion.finish_reason == "stop"  # by a token that is no part of the text
        text = self.tokenizer.decode(completion.tokens[: len(completion.tokens) - ended])
        try:
            reward = float(self.task.reward(conversation, text))
        except Exception as error:
            raise ValueError(f"the task's reward fails on {text[:SHOWN_CHARS]!r}: {one_line(error)}") from error
        if not math.isfinite(reward):
            raise ValueError(f"the task's reward of {text[:SHOWN_CHARS]!r} is {reward}")
        return text, reward


class RolloutActor:
    """Answers by weights that it finds in Ray's object store; on CPUs the engine reads them there."""

    def __init__(self, task: Task, options: RlOptions, tokenizer: str, config: dict, dtype: torch.dtype, share: float):
        """share: of its host's CPUs."""
        torch.set_num_threads(max(1, int(share * machine.available_cpus())))
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        with device:
            self.model = GPT(GPTConfig(**config)).set_compute_dtype(dtype).requires_grad_(False)
        for p in self.model.parameters():
            p.data = p.data.to(dtype)
        self.asker = Asker(task, options, Tokenizer.load(tokenizer), device)
        self.version: int | None = None

    def ask(self, weights: np.ndarray, version: int, questions: list[Question], num_samples: int) -> Asked:
        """version: of the weights; those that the actor has already are not taken again."""
        began = time.perf_counter()
        if version != self.version:
            unflatten(weights, self.model)
            self.asker.take_weights(self.model)
            self.version = version
        sync = time.perf_counter() - began
        answers = self.asker.ask(questions, num_samples)
        return Asked(answers, version, time.perf_counter() - began - sync, sync)


@torch.no_grad()
def flatten(model: GPT) -> np.ndarray:
    """All weights in the compute dtype, to which an engine casts them in any case, as one array of their bits."""
    flat = torch.cat([p.to(model.compute_dtype).flatten() for p in model.parameters()]).cpu()
    return flat.view(torch.int16 if flat.element_size() == 2 else torch.int32).numpy()


@torch.no_grad()
def unflatten(weights: np.ndarray, model: GPT) -> None:
    """The inverse of flatten. On a CPU the weights are the array's memory from now on, which nobody writes."""
    with warnings.catch_warnings():  # Ray's arrays are read-only, of which torch warns
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.from_numpy(weights).view(model.compute_dtype)
    parts = flat.split([p.numel() for p in model.parameters()])
    for p, part in zip(model.parameters(), parts, strict=True):
        if p.is_cuda:
            p.copy_(part.view(p.shape))
        else:
            p.data = part.view(p.shape)


class Pending(NamedTuple):
    """A step's questions, which the actors are answering."""

    step: int
    version: int
    answers: list[ray.ObjectRef]
    sync: float


class Policy:
    """Asks a step's questions and learns from the answers: what the loop calls for each step, on every rank."""

    def __init__(self, task: Task, options: RlOptions):
        self.task, self.o = task, options
        self.asker: Asker | None = None  # of this rank's own
        self.actors: list = []  # of rank 0
        self.given: ray.ObjectRef | None = None  # the task, for actors that are started again
        self.pending: Pending | None = None

    def __call__(self, worker: Worker) -> Learned:
        began = time.perf_counter()
        worker.optimizer.wait()  # other ranks may be sending weights still
        asked = self.asked(worker)
        rollout_seconds = time.perf_counter() - began
        if worker.rank == 0 and due(worker.progress.step, worker.config.sample_every):
            with measuring("writing samples", worker.say):
                append_samples(worker, shown(asked.answers))

        answers = [answer for group in asked.answers for answer in group]
        advantages = advantages_of(asked.answers, self.o.advantage_by_std)
        silent = sum(len({answer.reward for answer in group}) == 1 for group in asked.answers)
        sums = [len(answers), sum(a.reward for a in answers), sum(a.cut for a in answers), silent]
        n, rewards, cut, silent, drawn = all_reduce(worker, [*sums, sum(sum(a.drawn) for a in answers)])
        stale = worker.progress.step - asked.version
        learned = learn(worker, answers, advantages, sampling(self.o), max(drawn, 1), bool(stale))
        trained, read, entropy, mismatch, ratio_cut = all_reduce(worker, learned.sums)
        seconds = time.perf_counter() - began
        metrics = {
            "train/epoch": (worker.progress.position + self.o.prompts_per_step) / len(self.task.train),
            "rl/reward": rewards / n,
            "rl/length": drawn / n,
            "rl/cut": cut / n,
            "rl/silent_groups": silent * self.o.num_samples / n,
            "rl/entropy": entropy / trained,
            "rl/mismatch_kl": mismatch / trained,
            "rl/mismatch_max": max(checkpoint.gather(learned.mismatch_max, worker.world_size)),
            "rl/ratio_cut": ratio_cut / trained,
            "rl/staleness": stale,
            "rl/sync_seconds": asked.sync,
            "rl/rollout_seconds": asked.seconds,
            "rl/rollout_tok_per_sec": drawn / asked.seconds,
            "rl/train_tok_per_sec": read / (seconds - rollout_seconds),
            "rl/train_idle": asked.waited / seconds,
            "rl/rollout_idle": max(0.0, 1 - asked.seconds / seconds),
        }
        return Learned(learned.loss, max(drawn, 1), int(read), metrics)

    def asked(self, worker: Worker) -> Asked:
        """This rank's share of the step's questions, answered."""
        step, rank, size = worker.progress.step, worker.rank, worker.world_size
        if not self.o.rollout_workers:
            began = time.perf_counter()
            asker = self.own_asker(worker.model, worker.tokenizer)
            sync = time.perf_counter() - began
            answers = asker.ask(self.questions(worker.progress.position, step, rank, size), self.o.num_samples)
            seconds = time.perf_counter() - began
            return Asked(answers, step, seconds - sync, sync, waited=seconds)
        shared: list = [self.from_actors(worker) if rank == 0 else None]
        if checkpoint.several(size):
            dist.broadcast_object_list(shared, src=0)
        first, end = (r * self.o.prompts_per_step // size for r in (rank, rank + 1))
        return replace(shared[0], answers=shared[0].answers[first:end])

    def questions(self, position: int, step: int, rank: int = 0, world_size: int = 1) -> list[Question]:
        """A rank's share of a step's, in the order of a Loader, each with the seed that its answers are drawn with."""
        order = Loader(self.task.train, self.o.prompts_per_step, rank, world_size, self.o.seed).indices(position)  # ty: ignore[invalid-argument-type]
        return [Question(self.task.train[i], seed_of(self.o.seed, step, int(i))) for i in order]

    def from_actors(self, worker: Worker) -> Asked:
        step, position = worker.progress.step, worker.progress.position
        if not self.actors:
            self.given = ray.put(self.task)
            self.actors = start_actors(self.given, self.o, worker)
        pending = self.pending or self.send(worker, step, position)
        began = time.perf_counter()
        parts = ray.get(pending.answers)
        waited = time.perf_counter() - began
        self.pending = None
        if self.o.staleness and step + 1 < worker.config.num_iterations:
            self.pending = self.send(worker, step + 1, position + self.o.prompts_per_step)
        n = len(parts)
        answers = [parts[i % n].answers[i // n] for i in range(self.o.prompts_per_step)]
        seconds, sync = max(part.seconds for part in parts), pending.sync + max(part.sync for part in parts)
        return Asked(answers, pending.version, seconds, sync, waited)

    def send(self, worker: Worker, step: int, position: int) -> Pending:
        """Have the actors answer a step's questions by the weights of now, each always the same part of them. Ray asks
        those of an actor that dies again."""
        began = time.perf_counter()
        weights, version = ray.put(flatten(worker.model)), worker.progress.step
        sync = time.perf_counter() - began
        questions, n = self.questions(position, step), len(self.actors)
        answers = [
            actor.ask.remote(weights, version, questions[i::n], self.o.num_samples)
            for i, actor in enumerate(self.actors)
        ]
        return Pending(step, version, answers, sync)

    def own_asker(self, model: GPT, tokenizer: Tokenizer) -> Asker:
        self.asker = self.asker or Asker(self.task, self.o, tokenizer, model.cos.device)
        self.asker.take_weights(model)
        return self.asker

    def measure(self, model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
        """pass@1, the share of answers that are right, and pass@k, of questions with a right one among k answers.

        Over the first held-out questions, shared by all ranks. Right is a reward of 1 or more.
        """
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        questions = [Question(c, seed_of(self.o.seed, "val", i)) for i, c in enumerate(self.task.val)]
        asker, k = self.own_asker(model, tokenizer), self.o.eval_samples
        groups = asker.ask(questions[: self.o.eval_questions][rank::size], k)
        right = [[answer.reward >= 1 for answer in group] for group in groups]
        right = np.array([group for part in checkpoint.gather(right, size) for group in part])
        return {"pass@1": float(right.mean()), f"pass@{k}": float(right.any(axis=1).mean())}


def start_actors(task: ray.ObjectRef, o: RlOptions, worker: Worker) -> list:
    """They end with this process. On CPUs they reserve none: they answer while the training workers wait."""
    c, n, on_gpu = worker.config, o.rollout_workers, worker.device.type == "cuda"
    share = min(1.0, len(alive()) / n)
    actor = ray.remote(RolloutActor).options(
        num_cpus=0, num_gpus=int(on_gpu), max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD"
    )
    return [actor.remote(task, o, c.tokenizer, c.model, worker.model.compute_dtype, share) for _ in range(n)]


def seed_of(*inputs) -> int:
    return int(storage.fingerprint(*inputs), 16) % 2**63


def shown(groups: list[list[Answer]]) -> list[str]:
    """For samples.md: the first question's best and worst answer."""
    best, worst = (pick(groups[0], key=lambda answer: answer.reward) for pick in (max, min))
    lines = []
    for answer in (best, worst)[: 1 + (best.reward != worst.reward)]:
        lines.append(f"- reward {answer.reward:g}: **{' '.join(answer.text.split())[:SHOWN_CHARS]}**")
    return lines

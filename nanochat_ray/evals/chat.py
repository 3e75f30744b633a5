"""ChatCORE, the chat model's score: accuracy over five tasks, centered on guessing.

Multiple choice is answered by the likeliest of the letters, many questions in a forward. GSM8K and HumanEval are
generated on the engine, all problems in its batches, and judged by the number and by running the tests.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from nanochat_ray import machine, storage
from nanochat_ray.data.tokenizer import Tokenizer
from nanochat_ray.evals.sandbox import run_program
from nanochat_ray.evals.tasks import arc, gsm8k, humaneval, mmlu
from nanochat_ray.inference.engine import Engine
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.measuring import measuring
from nanochat_ray.model.gpt import GPT
from nanochat_ray.train.checkpoint import load_model
from nanochat_ray.train.loop import Measurement


@dataclass(frozen=True)
class Task:
    conversations: Callable[..., Iterable[dict]]  # takes datasets_dir and size
    judge: Callable[[dict, str], bool]
    baseline: float  # accuracy of guessing
    generates: bool


TASKS = {
    "ARC-Easy": Task(partial(arc.conversations, "ARC-Easy", "test"), arc.judge, 0.25, False),
    "ARC-Challenge": Task(partial(arc.conversations, "ARC-Challenge", "test"), arc.judge, 0.25, False),
    "MMLU": Task(partial(mmlu.conversations, "all", "test"), mmlu.judge, 0.25, False),
    "GSM8K": Task(partial(gsm8k.conversations, "test"), gsm8k.judge, 0.0, True),
    "HumanEval": Task(humaneval.conversations, humaneval.judge, 0.0, True),
}
# What the programs of HumanEval import; where it fails, the sandbox does, and not the model.
SANDBOX_CHECK = "import collections, functools, hashlib, heapq, itertools, math, random, re, string, typing"


@dataclass
class ChatCoreOptions:
    checkpoint: str
    """Folder of the checkpoint, or a run folder, of which the newest is taken."""
    tasks: list[str] | None = None
    """Some of ARC-Easy, ARC-Challenge, MMLU, GSM8K, HumanEval; the score is then their mean."""
    max_problems: int | None = None
    """Problems of each task, the first of the shuffled ones; all by default."""
    datasets_dir: str | None = None
    """Folder with the Hub's layout (openai/gsm8k/…) to read datasets from; without it they come from the Hub."""
    batch_size: int = 32
    """Problems that share a forward pass."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int | None = 50
    """Sample among this many likeliest tokens."""
    out: str | None = None
    """Folder to write chatcore.json and chatcore_answers.jsonl to; the default is the one given as --checkpoint."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""


@dataclass
class ChatCoreInTraining:
    chatcore_every: int = 0
    """Steps between ChatCORE scores, the last of them at the end; 0 for none."""
    chatcore_max_problems: int | None = 100
    """Problems of each task in them."""
    chatcore_tasks: list[str] | None = None
    """Some of ARC-Easy, ARC-Challenge, MMLU, GSM8K, HumanEval; the score is then their mean."""


@dataclass
class ChatResult:
    """By task: accuracy, accuracy centered on guessing (0) and perfection (1), and the answers in shuffled order.

    An answer is {correct, answer}; the answer of multiple choice is the letter. It is None, and wrong, where the
    question is longer than the model's reach."""

    accuracy: dict[str, float] = field(default_factory=dict)
    centered: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def chatcore_metric(self) -> float:
        return sum(self.centered.values()) / len(self.centered)

    def metrics(self) -> dict[str, float]:
        """Under the names that a run logs."""
        return {"chatcore_metric": self.chatcore_metric} | {f"chatcore/{task}": a for task, a in self.accuracy.items()}

    def table(self) -> str:
        lines = [f"{'task':<16}{'problems':>9}{'accuracy':>10}{'centered':>10}"]
        for task, answers in self.answers.items():
            lines.append(f"{task:<16}{len(answers):9}{self.accuracy[task]:10.4f}{self.centered[task]:10.4f}")
        of = "" if len(self.answers) == len(TASKS) else f", the mean of {len(self.answers)} of its {len(TASKS)} tasks"
        return "\n".join([*lines, f"ChatCORE {self.chatcore_metric:36.4f}{of}"])


def run(options: ChatCoreOptions) -> ChatResult:
    """Evaluate a checkpoint and write its answers. Raises OSError naming a dataset that can't be had."""
    problems = load_problems(options.tasks, options.max_problems, options.datasets_dir)
    model, tokenizer, _ = load_model(options.checkpoint, options.device, options.dtype)
    params = SamplingParams(options.max_new_tokens, options.temperature, options.top_k)
    result = evaluate_chat(model, tokenizer, problems, params, options.batch_size)
    with measuring("writing chat.json"):
        save(result, options.out or options.checkpoint)
    return result


def in_training(options: ChatCoreInTraining, datasets_dir: str | None) -> Measurement | None:
    """ChatCORE for sft.run, or None when it is not asked for. Raises OSError or ValueError as run does."""
    if options.chatcore_every <= 0:
        return None
    problems = load_problems(options.chatcore_tasks, options.chatcore_max_problems, datasets_dir)
    if "HumanEval" in problems:
        check_sandbox()
    return Measurement(options.chatcore_every, partial(measure, problems), "ChatCORE")


def measure(problems: dict[str, list[dict]], model: GPT, tokenizer: Tokenizer) -> dict[str, float]:
    return evaluate_chat(model, tokenizer, problems).metrics()


def load_problems(
    tasks: list[str] | None = None, max_problems: int | None = None, datasets_dir: str | None = None
) -> dict[str, list[dict]]:
    """The problems of each task, all tasks by default. Raises ValueError for an unknown task, OSError for one that
    can't be had."""
    if unknown := set(tasks or []) - set(TASKS):
        raise ValueError(f"no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    if max_problems is not None and max_problems < 1:
        raise ValueError(f"max_problems {max_problems} must be 1 or more")
    problems = {}
    for name in tasks or TASKS:
        try:
            problems[name] = list(TASKS[name].conversations(datasets_dir=datasets_dir, size=max_problems))
        except OSError as error:
            raise OSError(f"{name}: {error}, or leave it out: --tasks, --chatcore-tasks") from None
    return problems


def evaluate_chat(
    model: GPT,
    tokenizer: Tokenizer,
    problems: dict[str, list[dict]],
    params: SamplingParams | None = None,
    batch_size: int = 32,
) -> ChatResult:
    """ChatCORE over the problems of load_problems, shared by all ranks of torch.distributed if there are any.

    params: how to generate; greedy answers of up to 512 tokens by default. Raises OSError where the sandbox that
    HumanEval needs does not work."""
    params = params or SamplingParams(max_tokens=512, temperature=0.0)
    result = ChatResult()
    for name, conversations in problems.items():
        task = TASKS[name]
        if name == "HumanEval":
            check_sandbox()
        mine = share(conversations)
        if task.generates:
            texts = generate(model, tokenizer, mine, params, batch_size)
        else:
            texts = choose(model, tokenizer, mine, batch_size)

        def judge(conversation: dict, text: str | None, task: Task = task) -> bool:
            return text is not None and task.judge(conversation, text)

        with ThreadPoolExecutor(machine.available_cpus()) as pool:  # HumanEval's programs run side by side
            correct = list(pool.map(judge, mine, texts))
        answers = gather([{"correct": c, "answer": text} for c, text in zip(correct, texts, strict=True)])
        too_long = sum(answer["answer"] is None for answer in answers)
        if too_long and is_first_rank():
            of = f"{too_long:,} of {len(answers):,} questions"
            print(f"{name}: {of} longer than the model's reach are counted as wrong", flush=True)
        accuracy = sum(answer["correct"] for answer in answers) / len(answers)
        result.answers[name] = answers
        result.accuracy[name] = accuracy
        result.centered[name] = (accuracy - task.baseline) / (1 - task.baseline)
    return result


def generate(
    model: GPT, tokenizer: Tokenizer, conversations: list[dict], params: SamplingParams, batch_size: int
) -> list[str | None]:
    """Each answer as text, tool calls included; None to a question that leaves no room for one."""
    engine = Engine(model, tokenizer, batch_size)
    asked = prompts(tokenizer, conversations)
    fitting = [prompt for prompt in asked if len(prompt) < engine.manager.capacity]
    texts = (tokenizer.decode(completion.tokens) for completion in engine.generate(fitting, params))
    return [next(texts) if len(prompt) < engine.manager.capacity else None for prompt in asked]


@torch.inference_mode()
def choose(model: GPT, tokenizer: Tokenizer, conversations: list[dict], batch_size: int) -> list[str | None]:
    """Each answer's letter: of the question's letters the one with the highest logit, the first of equals.

    None where the question is longer than the model's reach."""
    device, ids = model.cos.device, prompts(tokenizer, conversations)
    chosen: list[str | None] = [None] * len(ids)
    fitting = (i for i in range(len(ids)) if len(ids[i]) <= model.cos.size(0))
    by_length = sorted(fitting, key=lambda i: len(ids[i]), reverse=True)  # little padding, and the most first
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        longest = len(ids[batch[0]])
        # Padding comes after the question, where it changes nothing.
        idx = torch.tensor([ids[i] + [tokenizer.bos_id] * (longest - len(ids[i])) for i in batch], device=device)
        last = torch.tensor([len(ids[i]) - 1 for i in batch], device=device)
        hidden = model.hidden(idx)[torch.arange(len(batch), device=device), last]
        letters = [conversations[i]["letters"] for i in batch]
        most = max(map(len, letters))
        # Their tokens, the last one again where a question has fewer: argmax takes the first of equals.
        tokens = [
            [letter_token(tokenizer, letter) for letter in [*row, *row[-1:] * (most - len(row))]] for row in letters
        ]
        best = model.logits(hidden).gather(1, torch.tensor(tokens, device=device)).argmax(1)
        for i, row, place in zip(batch, letters, best.tolist(), strict=True):
            chosen[i] = row[place]
    return chosen


def prompts(tokenizer: Tokenizer, conversations: list[dict]) -> list[list[int]]:
    """Each conversation's tokens up to where the assistant's answer begins."""
    return [tokenizer.render_for_completion({"messages": c["messages"][:-1]}) for c in conversations]


def letter_token(tokenizer: Tokenizer, letter: str) -> int:
    (token,) = tokenizer.encode(letter)  # one byte is always one token
    return token


def share(items: list) -> list:
    """This rank's part: every world_size-th."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(mine: list) -> list:
    """What share took apart, from all ranks, in order."""
    if not dist.is_initialized():
        return mine
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def check_sandbox() -> None:
    """See that ordinary programs run in the sandbox, and say what protects this machine from the others."""
    result = run_program(SANDBOX_CHECK)
    if not result.passed:
        raise OSError(f"the sandbox can't run {SANDBOX_CHECK!r}: {result.error}")
    if is_first_rank():
        print(f"HumanEval's programs run in a sandbox of {result.protection}", flush=True)


def save(result: ChatResult, folder: str) -> None:
    """chatcore.json with the numbers, and chatcore_answers.jsonl, a line an answer in shuffled order."""
    numbers = {"chatcore_metric": result.chatcore_metric, "accuracy": result.accuracy, "centered": result.centered}
    storage.write_json(storage.join(folder, "chatcore.json"), numbers)
    lines = [
        json.dumps({"task": task, "index": index, **answer})
        for task, answers in result.answers.items()
        for index, answer in enumerate(answers)
    ]
    storage.write_bytes(storage.join(folder, "chatcore_answers.jsonl"), "".join(f"{line}\n" for line in lines).encode())

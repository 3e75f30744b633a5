"""ChatCORE, the score of a chat model: accuracy over five tasks, centered on guessing.

A multiple-choice question is answered by its most likely letter, with many questions per forward pass. For GSM8K and
HumanEval the engine generates the answers in batches. They are judged by the final number, and by running the tests.
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
# The imports of HumanEval's programs. If they fail, the sandbox is at fault and not the model.
SANDBOX_CHECK = "import collections, functools, hashlib, heapq, itertools, math, random, re, string, typing"


@dataclass
class ChatCoreOptions:
    checkpoint: str
    """Folder of the checkpoint, or a run folder, whose newest checkpoint is used."""
    tasks: list[str] | None = None
    """Only these of ARC-Easy, ARC-Challenge, MMLU, GSM8K, HumanEval. The score is then their mean."""
    max_problems: int | None = None
    """Problems per task, the first after shuffling. Default: all."""
    datasets_dir: str | None = None
    """Folder with the Hub's layout (openai/gsm8k/…) to read datasets from. Default: download them from the Hub."""
    batch_size: int = 32
    """Problems per forward pass."""
    max_new_tokens: int = 512
    """Maximum tokens of an answer."""
    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_k: int | None = 50
    """Sample from this many most likely tokens."""
    out: str | None = None
    """Folder for chatcore.json and chatcore_answers.jsonl. Default: the folder given as --checkpoint."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str | None = None
    """float32 or bfloat16. Default: bfloat16 if the hardware is fast at it."""


@dataclass
class ChatCoreInTraining:
    chatcore_every: int = 0
    """Steps between ChatCORE scores. The last step is scored, too. 0 for none."""
    chatcore_max_problems: int | None = 100
    """Problems per task in these scores."""
    chatcore_tasks: list[str] | None = None
    """Only these of ARC-Easy, ARC-Challenge, MMLU, GSM8K, HumanEval. The score is then their mean."""


@dataclass
class ChatResult:
    """Per task: accuracy, centered accuracy (guessing is 0, perfection is 1), and the answers in shuffled order.

    An answer is {correct, answer}. For multiple choice, `answer` is the letter. If the question is longer than the
    model's reach, `answer` is None and `correct` is False."""

    accuracy: dict[str, float] = field(default_factory=dict)
    centered: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def chatcore_metric(self) -> float:
        return sum(self.centered.values()) / len(self.centered)

    def metrics(self) -> dict[str, float]:
        """Return the score and the accuracies by their names in a run's log."""
        return {"chatcore_metric": self.chatcore_metric} | {f"chatcore/{task}": a for task, a in self.accuracy.items()}

    def table(self) -> str:
        lines = [f"{'task':<16}{'problems':>9}{'accuracy':>10}{'centered':>10}"]
        for task, answers in self.answers.items():
            lines.append(f"{task:<16}{len(answers):9}{self.accuracy[task]:10.4f}{self.centered[task]:10.4f}")
        of = "" if len(self.answers) == len(TASKS) else f", the mean of {len(self.answers)} of its {len(TASKS)} tasks"
        return "\n".join([*lines, f"ChatCORE {self.chatcore_metric:36.4f}{of}"])


def run(options: ChatCoreOptions) -> ChatResult:
    """Evaluate a checkpoint and write its answers. Raises OSError with the name of a dataset that can't be read."""
    problems = load_problems(options.tasks, options.max_problems, options.datasets_dir)
    model, tokenizer, _ = load_model(options.checkpoint, options.device, options.dtype)
    params = SamplingParams(options.max_new_tokens, options.temperature, options.top_k)
    result = evaluate_chat(model, tokenizer, problems, params, options.batch_size)
    with measuring("writing chatcore.json"):
        save(result, options.out or options.checkpoint)
    return result


def in_training(options: ChatCoreInTraining, datasets_dir: str | None) -> Measurement | None:
    """Return the ChatCORE measurement for sft.run, or None if chatcore_every is 0.

    Raises OSError or ValueError as load_problems does, and OSError if the sandbox for HumanEval does not work."""
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
    """Return the problems of each task, by default of all tasks.

    Raises ValueError for an unknown task or if max_problems is below 1, and OSError if a dataset can't be read."""
    if unknown := set(tasks or []) - set(TASKS):
        raise ValueError(f"no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    if max_problems is not None and max_problems < 1:
        raise ValueError(f"max_problems {max_problems} must be 1 or more")
    problems = {}
    for name in tasks or TASKS:
        try:
            problems[name] = list(TASKS[name].conversations(datasets_dir=datasets_dir, size=max_problems))
        except OSError as error:
            raise OSError(f"{name}: {error}, or leave the task out with --tasks or --chatcore-tasks") from None
    return problems


def evaluate_chat(
    model: GPT,
    tokenizer: Tokenizer,
    problems: dict[str, list[dict]],
    params: SamplingParams | None = None,
    batch_size: int = 32,
) -> ChatResult:
    """Return the ChatCORE of a model on the problems of load_problems. All ranks of torch.distributed share them.

    params: how to generate; by default greedy answers of up to 512 tokens. Raises OSError if the sandbox for HumanEval
    does not work."""
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

        with ThreadPoolExecutor(machine.available_cpus()) as pool:  # run HumanEval's programs in parallel
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
    """Return each answer as text with its tool calls. It is None if the question leaves no room for an answer."""
    engine = Engine(model, tokenizer, batch_size)
    asked = prompts(tokenizer, conversations)
    fitting = [prompt for prompt in asked if len(prompt) < engine.manager.capacity]
    texts = (tokenizer.decode(completion.tokens) for completion in engine.generate(fitting, params))
    return [next(texts) if len(prompt) < engine.manager.capacity else None for prompt in asked]


@torch.inference_mode()
def choose(model: GPT, tokenizer: Tokenizer, conversations: list[dict], batch_size: int) -> list[str | None]:
    """Return the letter of each question that has the highest logit, the first of equals.

    It is None if the question is longer than the model's reach."""
    device, ids = model.cos.device, prompts(tokenizer, conversations)
    chosen: list[str | None] = [None] * len(ids)
    fitting = (i for i in range(len(ids)) if len(ids[i]) <= model.cos.size(0))
    by_length = sorted(fitting, key=lambda i: len(ids[i]), reverse=True)  # for little padding; the longest first
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        longest = len(ids[batch[0]])
        # Padding follows the question, so the question does not attend to it.
        idx = torch.tensor([ids[i] + [tokenizer.bos_id] * (longest - len(ids[i])) for i in batch], device=device)
        last = torch.tensor([len(ids[i]) - 1 for i in batch], device=device)
        hidden = model.hidden(idx)[torch.arange(len(batch), device=device), last]
        letters = [conversations[i]["letters"] for i in batch]
        width = max(map(len, letters))
        # A question with fewer letters repeats its last one. This changes nothing: argmax takes the first of equals.
        tokens = [
            [letter_token(tokenizer, letter) for letter in [*row, *row[-1:] * (width - len(row))]] for row in letters
        ]
        best = model.logits(hidden).gather(1, torch.tensor(tokens, device=device)).argmax(1)
        for i, row, place in zip(batch, letters, best.tolist(), strict=True):
            chosen[i] = row[place]
    return chosen


def prompts(tokenizer: Tokenizer, conversations: list[dict]) -> list[list[int]]:
    """Return each conversation's tokens up to the beginning of the assistant's answer."""
    return [tokenizer.render_for_completion({"messages": c["messages"][:-1]}) for c in conversations]


def letter_token(tokenizer: Tokenizer, letter: str) -> int:
    (token,) = tokenizer.encode(letter)  # one byte is always one token
    return token


def share(items: list) -> list:
    """Return this rank's part of the items: every world_size-th."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(mine: list) -> list:
    """Collect the parts that share() made from all ranks, and return them in the original order."""
    if not dist.is_initialized():
        return mine
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def check_sandbox() -> None:
    """Check that a program can run in the sandbox, and print the layers in effect. Raises OSError if it can't."""
    result = run_program(SANDBOX_CHECK)
    if not result.passed:
        raise OSError(f"the sandbox can't run {SANDBOX_CHECK!r}: {result.error}")
    if is_first_rank():
        print(f"HumanEval's programs run in a sandbox of {result.protection}", flush=True)


def save(result: ChatResult, folder: str) -> None:
    """Write chatcore.json with the scores, and chatcore_answers.jsonl with a line per answer, in shuffled order."""
    numbers = {"chatcore_metric": result.chatcore_metric, "accuracy": result.accuracy, "centered": result.centered}
    storage.write_json(storage.join(folder, "chatcore.json"), numbers)
    lines = [
        json.dumps({"task": task, "index": index, **answer})
        for task, answers in result.answers.items()
        for index, answer in enumerate(answers)
    ]
    storage.write_bytes(storage.join(folder, "chatcore_answers.jsonl"), "".join(f"{line}\n" for line in lines).encode())

"""What reinforcement learning costs: its answers beside the engine alone, weights on their way, trl's GRPOTrainer.

Random weights, whose answers all run to their full length. The two sides of a ratio take turns, and medians count.

    python -m benchmarks.rl --json
    python -m benchmarks.rl --peer-python VENV/bin/python     also trl, from an environment with `pip install trl`
"""

import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.train import tokenizer_of_size
from nanochat_ray.data.tokenizer import SPECIAL_TOKENS
from nanochat_ray.evals.tasks import arithmetic
from nanochat_ray.inference.sampling import SamplingParams
from nanochat_ray.model.gpt import GPT, GPTConfig
from nanochat_ray.model.optim import build_optimizer
from nanochat_ray.model.scaling import BASE_LRS
from nanochat_ray.session import one_line_errors, start_ray
from nanochat_ray.train import rl
from nanochat_ray.train.checkpoint import compute_dtype
from nanochat_ray.train.policy_gradient import advantages_of, learn

PEER = Path(__file__).with_name("rl_peer.py")


@dataclass
class Options:
    depth: int = 4
    weights: tuple[int, ...] = (4, 12)
    """Depths whose weights are sent to an actor."""
    seq: int = 512
    vocab: int = 8192
    prompts: int = 8
    """Questions of a step."""
    samples: int = 8
    """Answers to each."""
    new: int = 48
    """Tokens of each answer."""
    dtype: str | None = None
    """float32 or bfloat16; the default is bfloat16 where the hardware is fast at it."""
    threads: int | None = None
    """Of torch, on both sides; the default is torch's."""
    cpu_time: bool = False
    """Take CPU seconds where it compares two sides: with --threads 1, where others use the machine too."""
    rounds: int = 5
    peer_python: str | None = None
    """Python that can import trl."""
    json: bool = False
    """End with one line of JSON."""


class Varied:
    """Rewards of any text that differ between answers, so that all of them are learned from."""

    def __init__(self):
        self.train = self.val = arithmetic.conversations("train", 400, seed=1)

    def reward(self, conversation: dict, answer: str) -> float:
        return len(answer) % 101 / 101


class Learner:
    """RL's steps without Ray Train."""

    def __init__(self, options: Options, depth: int):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else compute_dtype(options.dtype, "cpu")
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        torch.manual_seed(0)
        self.tokenizer = tokenizer_of_size(options.vocab)
        with device:
            self.model = GPT(GPTConfig(options.seq, options.vocab, depth, depth, depth, 64 * depth))
        self.model.init_weights()
        with torch.no_grad():  # special tokens, which end answers, never are among the likeliest
            self.model.lm_head.weight.normal_(std=0.1)[[self.tokenizer.special(name) for name in SPECIAL_TOKENS]] = 0
        self.model.set_compute_dtype(dtype)
        self.o = rl.RlOptions(
            "", prompts_per_step=options.prompts, num_samples=options.samples, max_new_tokens=options.new
        )
        self.policy, self.step_number = rl.Policy(Varied(), self.o), 0
        self.worker = SimpleNamespace(
            config=SimpleNamespace(device_batch_size=32),
            model=self.model,
            optimizer=build_optimizer(
                self.model, **{k: rl.LR_SCALE * lr for k, lr in BASE_LRS.items()}, weight_decay=0
            ),
            device=device,
            world_size=1,
        )

    def now(self) -> float:
        """Seconds, once all that the device has been given is done."""
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def asker(self) -> rl.Asker:
        """With the weights of now, and a cache that knows no prompt."""
        return self.policy.own_asker(self.model, self.tokenizer)

    def questions(self) -> list[rl.Question]:
        self.step_number += 1
        return self.policy.questions(self.step_number * self.o.prompts_per_step, self.step_number)

    def step(self) -> tuple[float, float, int]:
        """Seconds in all and of learning, and tokens that were sampled."""
        began = self.now()
        groups = self.asker().ask(self.questions(), self.o.num_samples)
        asked = self.now()
        answers = [answer for group in groups for answer in group]
        drawn = sum(sum(answer.drawn) for answer in answers)
        learn(self.worker, answers, advantages_of(groups, False), rl.sampling(self.o), drawn, False)
        self.worker.optimizer.step()
        ended = self.now()
        return ended - began, ended - asked, drawn


def engine(learner: Learner, rounds: int) -> dict:
    """Tokens a second of RL's asking, and of the engine alone that samples alike; the median of their ratios."""
    o, speeds = learner.o, []
    for _ in range(rounds + 1):
        asker, questions, pair = learner.asker(), learner.questions(), []
        prompts = [asker.prompt(question.conversation) for question in questions]
        params = [
            SamplingParams(o.max_new_tokens, o.temperature, o.top_k, seed=q.seed, n=o.num_samples) for q in questions
        ]
        for call, *inputs in ((asker.ask, questions, o.num_samples), (asker.engine.generate, prompts, params)):
            counts = learner.asker().engine.counts
            before, began = counts["generated_tokens"], learner.now()
            call(*inputs)
            pair.append((counts["generated_tokens"] - before) / (learner.now() - began))
        speeds.append(pair)
    asking, alone = (statistics.median(side) for side in zip(*speeds[1:], strict=True))
    return {"asking": asking, "engine": alone, "ratio": statistics.median(a / b for a, b in speeds[1:])}


def weights(learner: Learner, rounds: int) -> dict:
    """Seconds until an actor has new weights, asked nothing, and the share of a step that this would be."""
    actor = ray.remote(rl.RolloutActor).options(num_cpus=0)
    model, seconds = learner.model, []
    with tempfile.TemporaryDirectory() as folder:
        learner.tokenizer.save(folder)
        task, config = learner.policy.task, asdict(model.config)
        actor = actor.remote(task, learner.o, folder, config, model.compute_dtype, 1.0)
        for version in range(rounds + 1):
            began = time.perf_counter()
            ray.get(actor.ask.remote(ray.put(rl.flatten(model)), version, [], 1))
            seconds.append(time.perf_counter() - began)
        ray.kill(actor)
    sync, step = statistics.median(seconds[1:]), statistics.median([learner.step()[0] for _ in range(3)][1:])
    return {"seconds": sync, "step_seconds": step, "share": sync / step}


def peer(learner: Learner, options: Options) -> dict:
    """Answers a second, learned from, of both; the median of the ratios of steps that take turns."""
    prompts = [learner.asker().prompt(conversation) for conversation in learner.policy.task.train]
    settings = asdict(options) | {
        "prompt_ids": prompts, "bf16": learner.model.compute_dtype == torch.bfloat16, "threads": torch.get_num_threads()
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        command = [options.peer_python, str(PEER), file.name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            steps = []
            for _ in range(options.rounds + 1):
                ours = learner.step()
                print("step", file=process.stdin, flush=True)
                line = next((line for line in process.stdout if line.startswith("{")), None)
                if line is None:
                    raise RuntimeError(f"{PEER.name} ended: see its error above")
                steps.append((*ours, *json.loads(line).values()))
            process.stdin.close()
    ours, learning, drawn, theirs, their_tokens = (statistics.median(x) for x in zip(*steps[1:], strict=True))
    answers, ratio = options.prompts * options.samples, statistics.median(step[3] / step[0] for step in steps[1:])
    return {
        "ours": answers / ours, "trl": answers / theirs, "ratio": ratio, "learning_share": learning / ours,
        "tokens": drawn, "trl_tokens": their_tokens,
    }  # fmt: skip


@one_line_errors
def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    learner, numbers = Learner(options, options.depth), {"threads": torch.get_num_threads()}
    numbers["dtype"] = str(learner.model.compute_dtype)
    numbers["engine"] = engine(learner, options.rounds)
    if options.weights:
        start_ray()
    for depth in options.weights:
        numbers[f"weights_d{depth}"] = weights(Learner(options, depth), options.rounds)
    if options.weights:
        ray.shutdown()
    if options.peer_python:
        numbers["peer"] = peer(learner, options)
    table = Table(
        "part", "figure", "value", title=f"d{options.depth}, {numbers['dtype']}, {numbers['threads']} threads"
    )
    for part, figures in numbers.items():
        for name, value in figures.items() if isinstance(figures, dict) else ():
            table.add_row(part, name, f"{value:,.3f}" if value < 100 else f"{value:,.0f}")
    Console().print(table)
    if options.json:
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()

"""Tasks to train on by rewards: those that come with nanochat-ray by name, and a user's own from a file."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import ray.cloudpickle

from nanochat_ray.data import sources
from nanochat_ray.evals.tasks import arithmetic, gsm8k, pydocs, spelling
from nanochat_ray.measuring import one_line

QUESTIONS, HELD_OUT = 1600, 400  # of tasks whose questions are made up
SEED = 1  # of those questions; finetuning's have another


@dataclass(kw_only=True)
class TaskOptions:
    task: str
    """arithmetic, spelling, counting (the letters of words), letters (both in turn), docstrings, gsm8k, or
    FILE.py:CLASS, a task of your own: docs/rl.md says what it takes."""
    datasets_dir: str | None = None
    """Folder with the Hub's layout to read gsm8k from; without it it comes from the Hub."""


@dataclass(frozen=True)
class Task:
    """Questions to learn from, questions held out, and whether an answer to one is right."""

    train: list[dict]
    val: list[dict]
    judge: Callable[[dict, str], bool]

    def reward(self, conversation: dict, answer: str) -> float:
        return float(self.judge(conversation, answer))


def load_task(options: TaskOptions):
    """A Task, or an instance of the user's class. Raises ValueError for one that is unknown or lacks something, OSError
    for a dataset that can't be had."""
    if ":" in options.task:
        return own_task(options.task)
    made: dict[str, Callable[[], Task]] = {
        "letters": lambda: in_turn(made["spelling"](), made["counting"]()),
        "arithmetic": lambda: made_up(arithmetic.conversations, arithmetic.judge),
        "spelling": lambda: made_up(spelling.conversations, spelling.judge, calls_tool=False),
        "counting": lambda: made_up(spelling.conversations, spelling.judge, calls_tool=True),
        "docstrings": docstrings,
        "gsm8k": lambda: Task(
            *(gsm8k.conversations(split, options.datasets_dir) for split in ("train", "test")), gsm8k.judge
        ),
    }
    if options.task not in made:
        raise ValueError(f"no task {options.task!r}; there are {', '.join(made)}, and FILE.py:CLASS for your own")
    return made[options.task]()


def made_up(conversations: Callable, judge: Callable[[dict, str], bool], calls_tool: bool | None = None) -> Task:
    """calls_tool: take those alone whose reference answer does, or doesn't."""

    def chosen(split: str, size: int) -> list[dict]:
        found = conversations(split, 4 * size, SEED)
        return [c for c in found if calls_tool in (None, isinstance(c["messages"][-1]["content"], list))][:size]

    return Task(chosen("train", QUESTIONS), chosen("val", HELD_OUT), judge)


def in_turn(*tasks: Task) -> Task:
    """A question of each, and so on."""
    train, val = (
        [c | {"task": i} for conversations in zip(*parts, strict=True) for i, c in enumerate(conversations)]
        for parts in ([task.train for task in tasks], [task.val for task in tasks])
    )
    return Task(train, val, lambda conversation, answer: tasks[conversation["task"]].judge(conversation, answer))


def docstrings() -> Task:
    shards = [shard.uri for shard in sources.resolve("pydocs").train]
    train, val = (pydocs.conversations(shards, split, n) for split, n in (("train", QUESTIONS), ("val", HELD_OUT)))
    return Task(train, val, pydocs.judge)


def own_task(name: str):
    """FILE.py:CLASS -> an instance. The class travels to the workers as it is: they need not have the file."""
    path, _, attribute = name.rpartition(":")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}: --task takes FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location("own_task", path)
    module = sys.modules["own_task"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        ray.cloudpickle.register_pickle_by_value(module)
        task = getattr(module, attribute)()
        if lacking := [part for part in ("train", "val", "reward") if not hasattr(task, part)]:
            raise ValueError(f"it has no {' and no '.join(lacking)}")
    except Exception as error:
        raise ValueError(f"{name} is no task: {one_line(error)}") from error
    return task

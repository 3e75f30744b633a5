"""Tasks for reinforcement learning: those of nanochat-ray by name, and a user's own from a file."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import ray.cloudpickle

from nanochat_ray.data import sources
from nanochat_ray.evals.tasks import arithmetic, gsm8k, pydocs, spelling
from nanochat_ray.measuring import one_line

TRAIN_QUESTIONS, VAL_QUESTIONS = 1600, 400  # per generated task, and for docstrings
SEED = 1  # for generated questions; finetuning uses another


@dataclass(kw_only=True)
class TaskOptions:
    task: str
    """arithmetic, spelling, counting (the letters of words), letters (spelling and counting in turn), docstrings,
    gsm8k, or FILE.py:CLASS for a task of your own, as in docs/rl.md."""
    datasets_dir: str | None = None
    """Folder with the Hub's layout to read gsm8k from. Default: download it from the Hub."""


@dataclass(frozen=True)
class Task:
    """Questions to train on, held-out questions, and the function that judges an answer."""

    train: list[dict]
    val: list[dict]
    judge: Callable[[dict, str], bool]

    def reward(self, conversation: dict, answer: str) -> float:
        return float(self.judge(conversation, answer))


def load_task(options: TaskOptions):
    """Return a Task, or an instance of the user's class.

    Raises ValueError if the task is unknown or incomplete, and OSError if its file or dataset can't be read."""
    if ":" in options.task:
        return own_task(options.task)
    made: dict[str, Callable[[], Task]] = {
        "letters": lambda: alternate(made["spelling"](), made["counting"]()),
        "arithmetic": lambda: generated(arithmetic.conversations, arithmetic.judge),
        "spelling": lambda: generated(spelling.conversations, spelling.judge, calls_tool=False),
        "counting": lambda: generated(spelling.conversations, spelling.judge, calls_tool=True),
        "docstrings": docstrings,
        "gsm8k": lambda: Task(
            *(gsm8k.conversations(split, options.datasets_dir) for split in ("train", "test")), gsm8k.judge
        ),
    }
    if options.task not in made:
        raise ValueError(f"no task {options.task!r}; there are {', '.join(made)}, and FILE.py:CLASS for your own")
    return made[options.task]()


def generated(conversations: Callable, judge: Callable[[dict, str], bool], calls_tool: bool | None = None) -> Task:
    """Return a task of generated questions. calls_tool: take only those whose reference answer does, or does not."""

    def chosen(split: str, size: int) -> list[dict]:
        found = conversations(split, 4 * size, SEED)
        return [c for c in found if calls_tool in (None, isinstance(c["messages"][-1]["content"], list))][:size]

    return Task(chosen("train", TRAIN_QUESTIONS), chosen("val", VAL_QUESTIONS), judge)


def alternate(*tasks: Task) -> Task:
    """Return a task with a question of each task in turn. All must have the same number of questions."""
    train, val = (
        [c | {"task": i} for conversations in zip(*parts, strict=True) for i, c in enumerate(conversations)]
        for parts in ([task.train for task in tasks], [task.val for task in tasks])
    )
    return Task(train, val, lambda conversation, answer: tasks[conversation["task"]].judge(conversation, answer))


def docstrings() -> Task:
    shards = [shard.uri for shard in sources.resolve("pydocs").train]
    train, val = (
        pydocs.conversations(shards, split, n) for split, n in (("train", TRAIN_QUESTIONS), ("val", VAL_QUESTIONS))
    )
    return Task(train, val, pydocs.judge)


def own_task(name: str):
    """Return an instance of the class in FILE.py:CLASS. Ray pickles it by value, so workers need not have the file.

    Raises FileNotFoundError if there is no such file, and ValueError for another ending or a class that is no task.
    """
    path, _, attribute = name.rpartition(":")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}: --task takes FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location("own_task", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"the name of {path} does not end in .py: --task takes FILE.py:CLASS")
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

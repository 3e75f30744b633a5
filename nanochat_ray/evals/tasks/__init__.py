"""What a model is taught and asked: each task has conversations(...) and judge(conversation, answer_text) -> bool."""

import sys
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from nanochat_ray.data.conversations import Conversations
from nanochat_ray.evals.tasks import arc, arithmetic, gsm8k, mmlu, own, pydocs, smoltalk, spelling
from nanochat_ray.evals.tasks.common import VAL_EVERY


@dataclass
class MixtureOptions:
    mixture: Literal["hub", "offline"] = "hub"
    """hub: SmolTalk, MMLU, GSM8K and spelling. offline: docstrings, arithmetic and spelling, which need no network."""
    datasets_dir: str | None = None
    """Folder with the Hub's layout (openai/gsm8k/…) to read datasets from; without it they come from the Hub."""
    smoltalk_epochs: int = 1
    """How many times SmolTalk is in the hub mixture; 0 leaves it out, here as below."""
    mmlu_epochs: int = 3
    """How many times MMLU's auxiliary_train is in it."""
    gsm8k_epochs: int = 4
    """How many times GSM8K's train is in it."""
    arc_epochs: int = 0
    """How many times the train splits of ARC-Easy and ARC-Challenge are in it."""
    spelling: int = 80_000
    """Conversations in it about the letters of words."""
    identity: str | None = None
    """A file of conversations about the assistant itself, twice in it: jsonl, json, parquet or arrow; each is a list of
    messages, or has one as `messages` or `conversations`."""
    max_rows: int | None = None
    """Conversations taken of each of its datasets, before they are repeated; all by default."""


def hub_mixture(split: str, options: MixtureOptions) -> Conversations:
    """Conversations of the Hub's datasets, mixed in an order that is the same every time.

    split: "train", a dataset as often as the options say, or "val": once, in about the same proportions. Raises
    OSError naming the dataset that can't be had, ValueError naming the line of the identity file that is wrong."""
    o, train, all_rows = options, split == "train", sys.maxsize
    test, validation = ("train", "train") if train else ("test", "validation")
    exams = ("auxiliary_train", "train") if train else ("all", "test")
    datasets = [  # epochs, conversations, most rows in val
        (o.smoltalk_epochs, partial(smoltalk.conversations, test), all_rows),
        (o.mmlu_epochs, partial(mmlu.conversations, *exams), 5200),
        (o.gsm8k_epochs, partial(gsm8k.conversations, test), 420),
        (o.arc_epochs, partial(arc.conversations, "ARC-Easy", validation), all_rows),
        (o.arc_epochs, partial(arc.conversations, "ARC-Challenge", validation), all_rows),
    ]
    max_rows = all_rows if o.max_rows is None else o.max_rows
    share = 1 if train else VAL_EVERY
    mixed = Conversations(spelling.conversations(split, min(o.spelling, max_rows) // share))
    if o.identity and train:
        mixed.add(own.conversations(o.identity), times=2)
    for epochs, conversations, val_rows in datasets:
        if epochs > 0:
            size = max_rows if train else min(val_rows, max(1, max_rows // VAL_EVERY))
            try:
                rows = conversations(datasets_dir=o.datasets_dir, size=size)
            except OSError as error:
                raise OSError(f"{error}; --mixture offline needs neither") from None
            mixed.add(rows, times=epochs if train else 1)
    mixed.shuffle(Random(42))
    return mixed


def offline_mixture(
    split: str, pydocs_shards: list[str], n_pydocs: int = 5500, n_arithmetic: int = 2500, n_spelling: int = 9700
) -> Conversations:
    """The three tasks that need no network, mixed in an order that is the same every time.

    split: "train" or "val". The numbers are those of training conversations; validation has a twentieth of each."""
    share = 1 if split == "train" else VAL_EVERY
    mixed = Conversations(pydocs.conversations(pydocs_shards, split, n_pydocs // share))
    mixed.add(arithmetic.conversations(split, n_arithmetic // share))
    mixed.add(spelling.conversations(split, n_spelling // share))
    mixed.shuffle(Random(f"offline mixture {split}"))
    return mixed

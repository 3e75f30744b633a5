"""What a model is taught and asked: each task has conversations(...) and judge(conversation, answer_text) -> bool."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Literal

from nanochat_ray.data import sources
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
    conversations: list[str] = field(default_factory=list)
    """Your own conversations, NAME=WEIGHT of each source. NAME is a file, a folder or a pattern (jsonl, json, parquet,
    arrow or csv; text also as .gz, .zst, .bz2 or .xz), or hub:owner/name[:config[:split]] for a data set of the Hub.
    The columns tell the format: OpenAI's (messages), ShareGPT's (conversations) or Alpaca's (instruction, input,
    output). WEIGHT is how often each conversation comes: 3 is three times, 0.5 is half of them, which a seed chooses;
    without it once. Only these are learned, and every 20th is kept for validation. If one NAME is `mixture` they are
    added to --mixture instead, whose validation is then the only one."""
    max_rows: int | None = None
    """Conversations taken of each of the mixture's datasets, before they are repeated; all by default."""

    @property
    def has_mixture(self) -> bool:
        return not self.conversations or own.MIXTURE in self.conversations

    @property
    def needs_ray(self) -> bool:
        """Whether docstrings are read, which Ray collects."""
        return self.has_mixture and self.mixture == "offline"


def sft_conversations(options: MixtureOptions) -> dict[str, Conversations]:
    """{"train", "val"}: the mixture, one's own conversations, or both, in an order that is the same every time.

    Raises OSError naming what can't be had, ValueError for conversations that can't be used."""
    splits = {"train": Conversations(), "val": Conversations()}
    for source, weight in [own.parse(argument) for argument in options.conversations]:  # all, before the first is read
        if source != own.MIXTURE:
            mine = own.conversations(source, options.datasets_dir)
            if not options.has_mixture:
                mine = _holding_out(mine, splits["val"])
            splits["train"].add(mine, times=weight)
    for split, mixed in splits.items():
        if not options.has_mixture:
            mixed.shuffle(Random(42))
        elif options.mixture == "hub":
            hub_mixture(split, options, mixed)
        else:
            offline_mixture(split, [shard.uri for shard in sources.resolve("pydocs").train], mixed=mixed)
    return splits


def _holding_out(conversations: Iterator[dict], val: Conversations) -> Iterator[dict]:
    """The conversations without every 20th of them, which goes to `val`; the second one is the first of those."""
    for i, conversation in enumerate(conversations):
        if i % VAL_EVERY == 1:
            val.add([conversation])
        else:
            yield conversation


def hub_mixture(split: str, options: MixtureOptions, mixed: Conversations | None = None) -> Conversations:
    """Conversations of the Hub's datasets, mixed in an order that is the same every time.

    split: "train", a dataset as often as the options say, or "val": once, in about the same proportions. mixed: others,
    to which they are added. Raises OSError naming the dataset that can't be had."""
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
    mixed = Conversations() if mixed is None else mixed
    mixed.add(spelling.conversations(split, min(o.spelling, max_rows) // share))
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
    split: str,
    pydocs_shards: list[str],
    n_pydocs: int = 5500,
    n_arithmetic: int = 2500,
    n_spelling: int = 9700,
    mixed: Conversations | None = None,
) -> Conversations:
    """The three tasks that need no network, mixed in an order that is the same every time.

    split: "train" or "val". The numbers are those of training conversations; validation has a twentieth of each.
    mixed: others, to which they are added."""
    share = 1 if split == "train" else VAL_EVERY
    mixed = Conversations() if mixed is None else mixed
    mixed.add(pydocs.conversations(pydocs_shards, split, n_pydocs // share))
    mixed.add(arithmetic.conversations(split, n_arithmetic // share))
    mixed.add(spelling.conversations(split, n_spelling // share))
    mixed.shuffle(Random(f"offline mixture {split}"))
    return mixed

"""Tasks to train and evaluate on. Each has conversations(...), and most judge(conversation, answer_text) -> bool."""

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
    """Folder with the Hub's layout (openai/gsm8k/…) to read datasets from. Default: download them from the Hub."""
    smoltalk_epochs: int = 1
    """Copies of SmolTalk in the hub mixture; 0 leaves it out."""
    mmlu_epochs: int = 3
    """Copies of MMLU's auxiliary_train in the hub mixture; 0 leaves it out."""
    gsm8k_epochs: int = 4
    """Copies of GSM8K's train split in the hub mixture; 0 leaves it out."""
    arc_epochs: int = 0
    """Copies of the train splits of ARC-Easy and ARC-Challenge in the hub mixture; 0 leaves them out."""
    spelling: int = 80_000
    """Conversations about the letters of words in the hub mixture."""
    conversations: list[str] = field(default_factory=list)
    """Your own conversations, as NAME=WEIGHT for each source. NAME is a file, a folder or a pattern (jsonl, json,
    parquet, arrow or csv; text also as .gz, .zst, .bz2 or .xz), or hub:owner/name[:config[:split]] for a data set of
    the Hub. The columns tell the format: OpenAI's (messages), ShareGPT's (conversations) or Alpaca's (instruction,
    input, output). WEIGHT is the number of copies of each conversation, by default 1; 0.5 takes half of them, chosen
    by a seed. The model learns only these conversations, and every 20th is kept for validation. If one NAME is
    `mixture`, they are added to --mixture instead, and all validation data comes from it."""
    max_rows: int | None = None
    """Maximum conversations from each of the mixture's datasets, before they are copied. Default: all."""

    @property
    def has_mixture(self) -> bool:
        return not self.conversations or own.MIXTURE in self.conversations

    @property
    def needs_ray(self) -> bool:
        """Whether the mixture has docstrings, because Ray collects them."""
        return self.has_mixture and self.mixture == "offline"


def sft_conversations(options: MixtureOptions) -> dict[str, Conversations]:
    """Return {"train", "val"}: the mixture, the user's own conversations, or both, always in the same order.

    Raises OSError with the name of a source that can't be read, and ValueError if conversations can't be used."""
    splits = {"train": Conversations(), "val": Conversations()}
    for source, weight in [own.parse(argument) for argument in options.conversations]:  # check all before reading one
        if source != own.MIXTURE:
            mine = own.conversations(source, options.datasets_dir)
            if not options.has_mixture:
                mine = _hold_out(mine, splits["val"])
            splits["train"].add(mine, times=weight)
    for split, mixed in splits.items():
        if not options.has_mixture:
            mixed.shuffle(Random(42))
        elif options.mixture == "hub":
            hub_mixture(split, options, mixed)
        else:
            offline_mixture(split, [shard.uri for shard in sources.resolve("pydocs").train], mixed=mixed)
    return splits


def _hold_out(conversations: Iterator[dict], val: Conversations) -> Iterator[dict]:
    """Yield the conversations, but add every 20th to `val` instead, beginning with the second."""
    for i, conversation in enumerate(conversations):
        if i % VAL_EVERY == 1:
            val.add([conversation])
        else:
            yield conversation


def hub_mixture(split: str, options: MixtureOptions, mixed: Conversations | None = None) -> Conversations:
    """Return conversations of the Hub's datasets, always mixed in the same order.

    split: "train" has the copies of each dataset that the options set; "val" has one copy, in about the same
    proportions. mixed: other conversations, to which these are added. Raises OSError with the name of a dataset that
    can't be read."""
    o, train, all_rows = options, split == "train", sys.maxsize
    test, validation = ("train", "train") if train else ("test", "validation")
    exams = ("auxiliary_train", "train") if train else ("all", "test")
    datasets = [  # epochs, conversations, maximum rows in val
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
                raise OSError(f"{error}; --mixture offline needs no data set") from None
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
    """Return conversations of the three tasks that need no network, always mixed in the same order.

    split: "train" or "val". The numbers are for training; validation has a twentieth of each. mixed: other
    conversations, to which these are added."""
    share = 1 if split == "train" else VAL_EVERY
    mixed = Conversations() if mixed is None else mixed
    mixed.add(pydocs.conversations(pydocs_shards, split, n_pydocs // share))
    mixed.add(arithmetic.conversations(split, n_arithmetic // share))
    mixed.add(spelling.conversations(split, n_spelling // share))
    mixed.shuffle(Random(f"offline mixture {split}"))
    return mixed

"""What a model is taught and asked: each task has conversations(...) and judge(conversation, answer_text) -> bool."""

from random import Random

from nanochat_ray.evals.tasks import arithmetic, pydocs, spelling
from nanochat_ray.evals.tasks.common import VAL_EVERY


def offline_mixture(
    split: str, pydocs_shards: list[str], n_pydocs: int = 4000, n_arithmetic: int = 3000, n_spelling: int = 3000
) -> list[dict]:
    """The three tasks that need no network, mixed in an order that is the same every time.

    split: "train" or "val". The numbers are those of training conversations; validation has a twentieth of each."""
    share = 1 if split == "train" else VAL_EVERY
    mixed = [
        *pydocs.conversations(pydocs_shards, split, n_pydocs // share),
        *arithmetic.conversations(split, n_arithmetic // share),
        *spelling.conversations(split, n_spelling // share),
    ]
    Random(f"offline mixture {split}").shuffle(mixed)
    return mixed

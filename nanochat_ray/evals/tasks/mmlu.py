"""MMLU (arXiv:2009.03300): exam questions of 57 subjects with four choices."""

from collections.abc import Iterator

from nanochat_ray.evals.tasks.common import hub_rows, multiple_choice, same_letter

LETTERS = ["A", "B", "C", "D"]

judge = same_letter


def conversations(config: str, split: str, datasets_dir: str | None = None, size: int | None = None) -> Iterator[dict]:
    """Return the questions. config: all, with the splits validation and test; or auxiliary_train, with the split train.

    auxiliary_train has about 100,000 questions from other exams."""
    rows = hub_rows("cais/mmlu", config, split, datasets_dir, size)
    rows = (row.get("train", row) for row in rows)  # auxiliary_train keeps each row in a column named train
    return (multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]]) for row in rows)

"""ARC (arXiv:1803.05457): multiple-choice questions of grade-school science, an easy and a challenging set."""

from nanochat_ray.evals.tasks.common import hub_rows, multiple_choice, same_letter

judge = same_letter


def conversations(config: str, split: str, datasets_dir: str | None = None, size: int | None = None) -> list[dict]:
    """Return the questions. config: ARC-Easy or ARC-Challenge; split: train, validation or test."""
    return [
        multiple_choice(row["question"], row["choices"]["text"], row["choices"]["label"], row["answerKey"])
        for row in hub_rows("allenai/ai2_arc", config, split, datasets_dir, size)
    ]

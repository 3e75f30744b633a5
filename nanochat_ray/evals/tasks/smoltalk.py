"""SmolTalk (arXiv:2502.02737) in its version for small models: everyday conversations of one or more turns."""

from collections.abc import Iterator

from nanochat_ray.evals.tasks.common import hub_rows

NAME = "HuggingFaceTB/smol-smoltalk"


def conversations(split: str, datasets_dir: str | None = None, size: int | None = None) -> Iterator[dict]:
    """Yield the conversations. split: train or test. Raises ValueError if the turns of one are not in order."""
    rows = hub_rows(NAME, None, split, datasets_dir, size)
    return ({"messages": checked(row["messages"], f"{NAME} {split}, shuffled row {i}")} for i, row in enumerate(rows))


def checked(messages: list[dict], where: str) -> list[dict]:
    """Return the messages. Raises ValueError unless user and assistant take turns, after a system message if any."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"{where}: roles {', '.join(roles) or 'missing'}; expected user and assistant in turns")
    if any(not isinstance(message["content"], str) for message in messages):
        raise ValueError(f"{where}: a message without text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]

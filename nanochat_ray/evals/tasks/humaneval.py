"""HumanEval (arXiv:2107.03374): the beginning of a Python function, to be completed so that its tests pass."""

import re

from nanochat_ray.evals.sandbox import run_program
from nanochat_ray.evals.tasks.common import conversation, hub_rows

FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.S)  # a model that is cut off does not close its block
IMPORT = re.compile(r"(?:import|from) .*")


def conversations(datasets_dir: str | None = None, size: int | None = None) -> list[dict]:
    """Prompt and finished program, with entry_point (the function's name) and test (what defines check)."""
    rows = hub_rows("openai/openai_humaneval", "openai_humaneval", "test", datasets_dir, size)
    return [
        conversation(row["prompt"], row["prompt"] + row["canonical_solution"])
        | {"entry_point": row["entry_point"], "test": row["test"]}
        for row in rows
    ]


def judge(conversation: dict, answer_text: str) -> bool:
    """Whether the answer's program passes the tests, in the sandbox. Raises OSError where that does not work."""
    return run_program(program(conversation, answer_text)).passed


def program(conversation: dict, answer_text: str) -> str:
    """The prompt's imports, the answer's code, the tests, and the call that runs them."""
    prompt = conversation["messages"][0]["content"]
    imports = [line for line in prompt.splitlines() if IMPORT.fullmatch(line)]
    check = f"check({conversation['entry_point']})"
    return "\n".join([*imports, "", code_of(answer_text), "", conversation["test"], "", check, ""])


def code_of(answer_text: str) -> str:
    """What is in the answer's first fenced block, or all of it."""
    fenced = FENCED.search(answer_text)
    return fenced[1] if fenced else answer_text.strip()

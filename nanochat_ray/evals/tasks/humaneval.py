"""HumanEval (arXiv:2107.03374): complete a Python function so that its tests pass."""

import ast
import re

from nanochat_ray.evals.sandbox import run_program
from nanochat_ray.evals.tasks.common import conversation, hub_rows

FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.S)  # an answer that is cut off does not close its block
IMPORT = re.compile(r"(?:import|from) .*")
FUTURE = re.compile(r"^from __future__ import .*", re.M)


def conversations(datasets_dir: str | None = None, size: int | None = None) -> list[dict]:
    """Return prompts and finished programs, with entry_point (the function's name) and test (code defining check)."""
    rows = hub_rows("openai/openai_humaneval", "openai_humaneval", "test", datasets_dir, size)
    return [
        conversation(row["prompt"], row["prompt"] + row["canonical_solution"])
        | {"entry_point": row["entry_point"], "test": row["test"]}
        for row in rows
    ]


def judge(conversation: dict, answer_text: str) -> bool:
    """Return whether the answer's program passes the tests in the sandbox. Raises OSError if the sandbox fails."""
    return run_program(program(conversation, answer_text)).passed


def program(conversation: dict, answer_text: str) -> str:
    """Return a program: the prompt's other definitions, the answer's code, the tests, and the call that runs them."""
    prompt, entry_point = conversation["messages"][0]["content"], conversation["entry_point"]
    code = code_of(answer_text)
    futures = FUTURE.findall(code)  # Python wants them as a program's first statements
    given = [*futures, *definitions(prompt, entry_point), "", FUTURE.sub("", code)]
    return "\n".join([*given, "", conversation["test"], "", f"check({entry_point})", ""])


def definitions(prompt: str, entry_point: str) -> list[str]:
    """Return the prompt's imports, helpers and constants as source. An answer may use them, or redefine them later."""
    lines = prompt.split("\n")
    try:
        statements = ast.parse(prompt).body
    except (SyntaxError, ValueError):  # the function has no body, not even a docstring
        return [line for line in lines if IMPORT.fullmatch(line)]
    found = []
    for statement in statements:
        if getattr(statement, "name", None) != entry_point:
            first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
            found += lines[first - 1 : statement.end_lineno]
    return found


def code_of(answer_text: str) -> str:
    """Return the content of the answer's first fenced block, or the whole answer without one."""
    fenced = FENCED.search(answer_text)
    return fenced[1] if fenced else answer_text.strip()

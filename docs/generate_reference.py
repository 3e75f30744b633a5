"""Writes the reference of all options, as Markdown, from the classes that the commands themselves parse.

The page is made at each build and is not in git, so it always describes the code beside it.
"""

import ast
import importlib
import inspect
import re
import textwrap
import typing
from dataclasses import MISSING, fields, is_dataclass

from nanochat_ray import cli

# Each has a main() that parses the named class.
EXPERIMENTS = {
    "speedrun": "SpeedrunOptions",
    "miniseries": "MiniseriesOptions",
    "scaling_laws": "ScalingLawsOptions",
    "compare": "CompareOptions",
    "tune_lr": "TuneLrOptions",
}
INTRODUCTION = """# Commands and options

The build makes this page from the code. `COMMAND --help` prints the same text. An option is written with dashes:
`--num-iterations 100`. An option of the type `bool` is switched by its name: `--rehearse`, `--no-rehearse`. One of the
type `bool or None` takes a value: `--compile False`. A list takes several values: `--depths 1 2 3`.
"""


class Parsed(Exception):
    """Carries the class of options out of a stage, before the stage does anything."""

    def __init__(self, options):
        self.options = options


def stage_options(stage: str) -> dict[str, type]:
    """A stage's classes of options, by the command that takes them: several where the stage has subcommands."""

    def stop(name: str, options: type, args: list[str]) -> None:
        raise Parsed(options)

    parse, cli.parse = cli.parse, stop
    try:
        cli.STAGES[stage]([])
    except Parsed as parsed:
        options = parsed.options
    finally:
        cli.parse = parse
    kinds = [kind for kind in typing.get_args(options) if hasattr(kind, "__metadata__")]
    if not kinds:
        return {f"nanochat-ray {stage}": options}
    return {f"nanochat-ray {stage} {kind.__metadata__[0].name}": kind.__origin__ for kind in kinds}


def declarations(options: type) -> dict[str, tuple[str, str]]:
    """Each field's type and docstring, as written in the class or in the nearest base that declares it."""
    found = {}
    for cls in reversed(options.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (TypeError, OSError):  # a built-in class has no source
            continue
        for statement, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                text = ""
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    text = " ".join(str(after.value.value).split())
                found[statement.target.id] = ast.unparse(statement.annotation), text
    return found


def defaults(options: type) -> dict[str, object]:
    """Each field's default in the order of the command line; MISSING where a value has to be given."""
    if is_dataclass(options):
        made = {f.name: f.default_factory for f in fields(options) if f.default_factory is not MISSING}
        return {f.name: made[f.name]() if f.name in made else f.default for f in fields(options) if f.init}
    return {
        name: MISSING if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in options.model_fields.items()
    }


def table(options: type) -> str:
    declared = declarations(options)
    lines = ["| option | values | default | |", "|---|---|---|---|"]
    for name, default in defaults(options).items():
        kind, text = declared[name][0].replace(" | ", " or "), declared[name][1]
        positional = re.fullmatch(r"Positional\[(.*)\]", kind)
        written = name.upper() if positional else f"--{name.replace('_', '-')}"
        shown = "required" if default is MISSING else f"`{default}`" if default not in (None, [], ()) else ""
        cells = (f"`{written}`", f"`{positional[1] if positional else kind}`", shown, text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page() -> str:
    parts = [INTRODUCTION]
    for stage, function in cli.STAGES.items():
        about, _, more = inspect.getdoc(function).partition("\n")
        for command, options in stage_options(stage).items():
            parts.append(f"## {command}\n\n{about}\n{more}\n\n{table(options)}\n")
    for module, name in EXPERIMENTS.items():
        found = importlib.import_module(f"experiments.{module}")
        parts.append(f"## python -m experiments.{module}\n\n{inspect.getdoc(found)}\n\n{table(getattr(found, name))}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())

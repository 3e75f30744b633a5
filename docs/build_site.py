"""Builds the site: stages the pages in build/docs, adds the generated ones, and runs zensical on them.

Pages link to files of the repository as they do on a code host, such as ../cluster/aws.yaml. A site has only what is in
its folder. So a link to a staged page is rewritten to it, a file that is linked is copied beside the pages, and of a
link to a folder only the text stays. Then a page reads the same in a checkout and on the site.

    python docs/build_site.py            # into site/; any broken link ends it with an error
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS, STAGED = REPOSITORY / "docs", REPOSITORY / "build" / "docs"
GENERATED = "reference/options.md"
# Pages from outside docs/, by their path on the site.
OUTSIDE = {
    "README.md": "start/overview.md",
    "CONTRIBUTING.md": "contributing/changes.md",
    "benchmarks/README.md": "performance/measurements.md",
}
LINK = re.compile(r"(\[[^\[\]]*\])\(([^)\s]+)\)")


def pages() -> dict[str, str]:
    """The site's path of each page in the repository, by its path there."""
    own = {path.relative_to(REPOSITORY).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
    return OUTSIDE | {name: path.relative_to(DOCS).as_posix() for name, path in own.items()}


def navigation() -> list[str]:
    """The pages in zensical.toml's navigation, in order."""

    def flatten(entries) -> list[str]:
        if isinstance(entries, str):
            return [entries]
        values = entries.values() if isinstance(entries, dict) else entries
        return [page for entry in values for page in flatten(entry)]

    return flatten(tomllib.loads((REPOSITORY / "zensical.toml").read_text())["project"]["nav"])


def relink(text: str, page: str, staged: dict[str, str]) -> tuple[str, set[str]]:
    """A page's text with the links of the site, and the repository's files that it links to.

    page: its path in the repository. Raises FileNotFoundError for a link to nothing.
    """
    linked = set()

    def rewritten(match: re.Match) -> str:
        label, (target, hash_, anchor) = match[1], match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(page), target))
        if path == f"docs/{GENERATED}":
            found = GENERATED
        elif path in staged:
            found = staged[path]
        elif f"{path}/README.md" in staged:
            found = staged[f"{path}/README.md"]
        elif (REPOSITORY / path).is_file():
            linked.add(path)
            found = f"files/{path}" if not path.startswith("docs/") else path.removeprefix("docs/")
        elif (REPOSITORY / path).is_dir():
            return label[1:-1]
        else:
            raise FileNotFoundError(f"{page} links to {target}, which does not exist")
        return f"{label}({os.path.relpath(found, os.path.dirname(staged[page]) or '.')}{hash_}{anchor})"

    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.M | re.S)  # code has no links
    code = {i: part for i, part in enumerate(parts) if part.startswith("`")}
    marked = "".join(f"\0{i}\0" if i in code else part for i, part in enumerate(parts))
    return re.sub(r"\0(\d+)\0", lambda m: code[int(m[1])], LINK.sub(rewritten, marked)), linked


def stage() -> None:
    """Write all that the site is made of into STAGED."""
    sys.path.insert(0, str(REPOSITORY))
    from generate_reference import page as options_page

    shutil.rmtree(STAGED, ignore_errors=True)
    staged, files = pages(), set()
    for source, target in staged.items():
        text, linked = relink((REPOSITORY / source).read_text(), source, staged)
        files |= linked
        (STAGED / target).parent.mkdir(parents=True, exist_ok=True)
        (STAGED / target).write_text(text)
    for name in files:
        target = STAGED / (name.removeprefix("docs/") if name.startswith("docs/") else f"files/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, target)
    shutil.copytree(DOCS / "theme", STAGED / "theme")
    (STAGED / GENERATED).write_text(options_page())


def main() -> None:
    stage()
    beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    zensical = shutil.which("zensical", path=beside)
    if zensical is None:
        sys.exit("error: zensical is not installed: run `make docs`, or install the extra `docs`")
    sys.exit(subprocess.run([zensical, "build", "--clean", "--strict"], cwd=REPOSITORY).returncode)


if __name__ == "__main__":
    main()

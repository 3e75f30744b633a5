"""The site: links, navigation, the generated reference; and a strict build where the extra `docs` is installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accessible import assert_accessible

from nanochat_ray.cli import STAGES

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "docs"), str(REPOSITORY / "docs/pictures")]
import build_site  # noqa: E402
import draw  # noqa: E402
import generate_reference  # noqa: E402


def test_every_page_is_in_the_navigation():
    assert sorted(build_site.navigation()) == sorted([*build_site.pages().values(), build_site.GENERATED])


@pytest.mark.parametrize("page", build_site.pages())
def test_links_lead_to_files(page):
    text = (REPOSITORY / page).read_text()
    build_site.relink(text, page, build_site.pages())  # raises for a link to nothing
    assert not re.search(r"!\[[^\]]*\]\(https?:|<(?:img|script|link)\b", text), "pages load nothing from elsewhere"


def test_a_link_to_nothing_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"docs/rl\.md links to nowhere\.md, which does not exist"):
        build_site.relink("[a\nlabel](nowhere.md)", "docs/rl.md", build_site.pages())


def test_links_out_of_docs_lead_to_pages_and_copies():
    text, files = build_site.relink(
        "[a](../README.md#b) [c](../cluster/aws.yaml) [d](../cluster) `[e](f)`\n```\n[g](h)\n```\n[i](https://ray.io)",
        "docs/clusters.md",
        build_site.pages() | {"docs/f": "f"},
    )
    assert text == (
        "[a](start/overview.md#b) [c](files/cluster/aws.yaml) d `[e](f)`\n```\n[g](h)\n```\n[i](https://ray.io)"
    )
    assert files == {"cluster/aws.yaml"}


def test_the_reference_has_every_stage_and_option():
    page = generate_reference.page()
    for stage in STAGES:
        assert re.search(rf"^## nanochat-ray {stage}\b", page, re.M)
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        assert "| `--" in section, f"no options of {section.splitlines()[0]}"
    assert "| `--depth` | `int` | `12` | The dial: layers of the Transformer. Width," in page  # of a base class
    assert "| `--port` | `int` | `8000` | Port to listen on. 0 takes any free port. |" in page  # of an inner class
    assert "| `--src` |" not in page and "| `SRC` | `str` | required |" in page  # given without a name


def test_the_map_of_changes_names_what_is_there():
    page = (REPOSITORY / "docs/contributing/where.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(table) >= 20
    for path in re.findall(r"`([^`]*[./][^`]*)`", page):
        assert (REPOSITORY / path).exists(), path


def test_pictures_are_those_that_the_script_draws():
    folder = REPOSITORY / "docs/pictures"
    assert {path.name: path.read_text() for path in folder.glob("*.svg")} == draw.pictures()


@pytest.mark.cluster
def test_the_site_builds_strictly_is_accessible_and_loads_nothing_from_elsewhere(request):
    if shutil.which("zensical", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip("the extra `docs` is not installed: `make docs` does it")
    built = subprocess.run([sys.executable, "docs/build_site.py"], cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    site = REPOSITORY / "site"
    assert {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")} >= set(
        build_site.navigation()
    )
    tags = r"""<(?:script|img|source|iframe)[^>]*\ssrc=|<link[^>]*\bhref=|url\(|@import"""
    loads = rf"""(?:{tags})\s*["']?((?:https?:)?//[^"'\s)>]*)"""
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css"):
            found = re.findall(loads, path.read_text())
            assert not found, f"{path.name} loads {found[0]}"
    page = request.getfixturevalue("page")  # skips without a browser
    for name in ("index.html", "how/index.html", "clusters.html", "reference/options.html"):
        page.goto((site / name).as_uri())
        assert_accessible(page)

"""Campaigns: what a patch may change, when a test stops, and how often a campaign accepts what is equal."""

import math
from pathlib import Path

import pytest
from scipy import stats

from benchmarks import verdicts
from experiments import compare, patches, research, sequential
from experiments.ledger import Ledger

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def code() -> bytes:
    return compare.archive(str(REPOSITORY))[0]


def patch(path: str, old: str, new: str) -> str:
    """A patch of this checkout that replaces text which a file has once."""
    before = (REPOSITORY / path).read_text()
    assert before.count(old) == 1
    return whole(path, before.splitlines(), before.replace(old, new).splitlines())


def whole(path: str, before: list[str], after: list[str]) -> str:
    lines = "\n".join([f"-{line}" for line in before] + [f"+{line}" for line in after])
    return f"--- a/{path}\n+++ b/{path}\n@@ -1,{len(before)} +1,{len(after)} @@\n{lines}\n"


def new_file(path: str, text: str) -> str:
    return f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+{text}\n"


def test_a_candidate_changes_how_training_goes(code):
    changed = patches.apply(
        code, patch("nanochat_ray/model/scaling.py", "REFERENCE_DEPTH = 12", "REFERENCE_DEPTH = 24")
    )
    assert b"REFERENCE_DEPTH = 24" in patches.unzip(changed)["nanochat_ray/model/scaling.py"]
    patches.apply(code, new_file("nanochat_ray/train/idea.py", "RATE = 2"))
    steps = patch("nanochat_ray/train/loop.py", 'loss_reduction="sum")', 'loss_reduction="sum") * 2')
    patches.apply(code, steps)  # how a step learns is in the file that measures, and may change


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (patch("nanochat_ray/evals/bpb.py", "return mixed_bpb", "return  mixed_bpb"), "nanochat_ray/evals/bpb.py"),
        (patch("nanochat_ray/train/metrics.py", "def bits_per_byte", "def bits_per_bite"), "train/metrics.py"),
        (
            patch("nanochat_ray/train/loop.py", "total_training_time += s", "total_training_time += 0.5 * s"),
            "train_step",
        ),
        (new_file("tests/test_idea.py", "pass"), "it changes tests/test_idea.py"),
        (new_file("nanochat_ray/torch.py", "pass"), "it changes nanochat_ray/torch.py"),
        (new_file("../outside.py", "pass"), "does not apply"),
        ("no patch at all", "does not apply"),
    ],
)
def test_a_patch_of_what_measures_is_refused(code, made, said):
    with pytest.raises(ValueError, match=said):
        patches.apply(code, made)


def test_a_proposer_reads_the_ledger_in_the_sandbox(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.add("An idea: more", "the patch")
    assert [c.name for c in ledger.all()] == ["001-An-idea-more"]
    program = tmp_path / "idea.py"
    program.write_text(
        "import json, socket, sys\n"
        "known = json.load(sys.stdin)\n"
        "try:\n    socket.create_connection(('127.0.0.1', 1))\nexcept PermissionError:\n    print('no network')\n"
        "except OSError as error:\n    print('no network' if error.errno != 111 else 'a network')\n"
        "print(known['candidates'][0]['patch'], known['code'])\n"
    )
    said = patches.propose(str(program), ledger.as_json({"a.py": "x"}), network=False)
    assert said == "no network\nthe patch {'a.py': 'x'}\n"
    with pytest.raises(ValueError, match="takes a Python file"):
        patches.propose("ls", "{}", network=False)


def test_bounds_are_those_of_the_literature():
    """Of five looks at a one-sided level of 2.5 %, as in tables of the Lan-DeMets spending function."""
    bounds = stats.norm.isf(sequential.levels((1, 2, 3, 4, 5), 0.025))
    assert bounds == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=0.002)


def test_a_test_stops_as_soon_as_its_level_allows():
    looks = (4, 8)
    assert sequential.decide([-0.1, -0.1, -0.1], looks, 0.05) == "more"
    assert sequential.decide([0.1, 0.11, 0.1, 0.11], looks, 0.05) == "worse"
    assert sequential.decide([-0.1, -0.11, -0.1, -0.11], looks, 0.05) == "better"
    assert sequential.decide([-0.1, 0.1] * 4, looks, 0.05) == "not distinguishable"


def test_a_run_that_misses_the_target_has_a_longer_time():
    curve = [
        {"step": t, "total_training_time": t, "total_training_flops": t, "val/bpb": v} for t, v in ((1, 3), (2, 2))
    ]
    assert research.time_to(curve, 2.5) == pytest.approx(math.sqrt(2))
    assert research.time_to(curve, 1.5) == pytest.approx(2 * math.sqrt(2))  # half as much again, in logarithms of time
    assert research.time_to(curve, -1) == pytest.approx(8)


def test_a_campaign_of_equal_codes_accepts_in_five_percent():
    assert verdicts.campaigns(100, candidates=20) <= 0.08
    assert verdicts.candidates_found(100, candidates=20, effect=0.3) > 0.8

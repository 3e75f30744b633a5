"""The design, the law and its best mixture on made-up losses, and what is said of a folder of results."""

import json

import numpy as np
import pytest
from test_findings import result

from experiments import findings, mixing_laws, mixtures, sweep
from experiments.report import write_report

NAMES = ["docs", "wiki", "code"]
# Each source is learned from itself, from docs also a little of code.
SLOPES = np.array([[-2.0, 0.9, 0.2], [0.8, -1.5, 0.9], [-0.1, 0.9, -1.8]])
FLOORS = np.array([1.0, 1.3, 0.8])
TARGET = np.full(3, 1 / 3)


def true_laws(scale: float = 1.0) -> mixing_laws.Laws:
    return mixing_laws.Laws(FLOORS * scale, SLOPES)


def losses(shares: np.ndarray, noise: float, seed: int, scale: float = 1.0) -> np.ndarray:
    exact = np.array([true_laws(scale)(r) for r in shares])
    return exact * (1 + noise * np.random.default_rng(seed).standard_normal(exact.shape))


def test_a_design_covers_the_simplex_and_grows():
    design = mixing_laws.design(10, [1000, 100, 10], seed=1)
    np.testing.assert_allclose(design.sum(axis=1), 1)
    assert design.min() >= 0.04 and (design.max(axis=0) > 0.8).all()
    np.testing.assert_allclose(design[0], 1 / 3)
    assert design[1].argsort().tolist() == [2, 1, 0]
    gaps = np.linalg.norm(design[:, None] - design, axis=2) + np.eye(10)
    assert gaps.min() > 0.1
    np.testing.assert_array_equal(mixing_laws.design(6, [1000, 100, 10], seed=1), design[:6])
    assert (mixing_laws.design(6, [1000, 100, 10], seed=2)[2:] != design[2:6]).any()


def test_without_noise_the_law_and_its_minimum_are_found():
    shares = mixing_laws.design(8, [1, 1, 1], seed=0)
    fit = mixing_laws.fit(shares, losses(shares, 0, 0), TARGET)
    elsewhere = np.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(fit.laws(elsewhere), true_laws()(elsewhere), rtol=0.01)
    np.testing.assert_allclose(fit.best, mixing_laws.minimum(true_laws(), TARGET), atol=0.02)


def test_intervals_hold_the_planted_optimum():
    """In at least 8 of 10 cases for each source, where 9.5 are to be expected."""
    best = mixing_laws.minimum(true_laws(), TARGET)
    draws = np.random.default_rng(0).dirichlet(np.ones(3) * 3, 3000)
    assert true_laws()(best) @ TARGET <= min(true_laws()(r) @ TARGET for r in draws)
    shares, held, widths = mixing_laws.design(10, [3, 2, 1], seed=0), np.zeros(3), []
    for seed in range(10):
        fit = mixing_laws.fit(shares, losses(shares, 0.005, seed), TARGET)
        held += [share.low <= true <= share.high for share, true in zip(fit.shares, best, strict=True)]
        widths += [share.width for share in fit.shares]
        assert 0.001 < fit.relative_error < 0.01
    assert (held >= 8).all(), held
    assert np.median(widths) < 0.2


def test_one_source_as_target_takes_all_and_too_few_points_are_refused():
    shares = mixing_laws.design(8, [1, 1, 1], seed=0)
    fit = mixing_laws.fit(shares, losses(shares, 0.002, 0), [0, 1, 0])
    assert fit.best[1] > 0.85 and fit.gain(fit.best, np.full(3, 1 / 3)).low > 0
    with pytest.raises(ValueError, match="4 mixtures of 3 sources are too few: a law needs at least 5"):
        mixing_laws.fit(shares[:4], losses(shares[:4], 0, 0), TARGET)


def test_targets_are_names_or_weights():
    assert mixtures.target_weights([], NAMES) == dict.fromkeys(NAMES, 1 / 3)
    assert mixtures.target_weights(["wiki"], NAMES) == {"docs": 0, "wiki": 1, "code": 0}
    assert mixtures.target_weights(["wiki=3", "code"], NAMES) == {"docs": 0, "wiki": 0.75, "code": 0.25}
    for wrong in (["news"], ["wiki=much"], ["wiki=-1"], ["wiki=0"]):
        with pytest.raises(ValueError, match="of docs, wiki, code"):
            mixtures.target_weights(wrong, NAMES)


def test_a_mixture_is_a_manifest_beside_its_sources(tmp_path):
    rows = tmp_path / "rows" / "a+b"
    rows.mkdir(parents=True)
    parts = [{"name": name, "rows": f"{name}-rows", "weight": 1} for name in "ab"]
    (rows / "manifest.json").write_text(json.dumps({"source_fingerprint": "f", "mixture": parts}))
    first, second = (mixtures.mix(str(rows), np.array(shares)) for shares in ([0.2, 0.8], [0.5, 0.5]))
    assert first == mixtures.mix(str(rows), np.array([0.2, 0.8])) != second
    assert [(part.name, part.weight) for part in mixtures.read_parts(first)] == [("a", 0.2), ("b", 0.8)]
    assert mixtures.read_parts(first)[0].rows == str(tmp_path / "rows" / "a-rows")


def write_results(folder, depths: dict[int, float], points: int = 8) -> str:
    """A sweep of made-up results; the losses of a depth are those of the laws with floors times a number."""
    shares, rows = mixing_laws.design(points, [3, 2, 1], seed=0), []
    for depth, scale in depths.items():
        for i, (r, bpb) in enumerate(zip(shares, losses(shares, 0.003, depth, scale), strict=True)):
            label = "equal" if i == 0 else "size" if i == 1 else f"p{i + 1}"
            more = {f"share/{n}": x for n, x in zip(NAMES, r, strict=True)}
            more |= {f"val_bpb/{n}": x for n, x in zip(NAMES, bpb, strict=True)}
            rows.append(result(f"d{depth}-{label}", depth, val_bpb=float(r @ bpb), mixture=label, **more))
    for row in rows:
        (folder / row["run"]).mkdir(parents=True)
        (folder / row["run"] / "result.json").write_text(json.dumps(row))
    about = {"kind": "mixtures", "sources": NAMES, "target": dict.fromkeys(NAMES, 1 / 3)}
    (folder / "sweep.json").write_text(json.dumps(about))
    sweep.write_results(str(folder), [{"name": row["run"]} for row in rows])
    return str(folder)


def test_findings_say_what_is_best_and_whether_it_holds(tmp_path):
    folder = write_results(tmp_path, {1: 1.0, 2: 0.8})
    said = "\n".join(findings.read(folder).sentences)
    for depth in (1, 2):
        assert f"depth {depth}: the best mixture is docs 4" in said
        assert f"depth {depth}: the best mixture is 0." in said and "below the equal mixture [-" in said
    assert "28 pairs of mixtures the same way" in said
    assert "the best mixture of depth 1 holds at depth 2" in said
    write_report([folder], str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "target_bpb" in page and page.count("<svg") >= 2


def test_findings_of_too_few_results_say_so(tmp_path):
    said = findings.read(write_results(tmp_path, {1: 1.0}, points=4)).sentences
    assert "depth 1: 4 mixtures of 3 sources are too few: a law needs at least 5" in said

import pytest
import torch

from benchmarks.rl import Learner, Options, engine


def test_both_sides_sample_the_same_tokens_and_a_step_learns_from_all_answers():
    options = Options(seq=64, vocab=512, prompts=2, samples=3, new=6, dtype="float32")
    learner = Learner(options, depth=1)
    figures = engine(learner, rounds=2)
    assert figures["ratio"] > 0.2 and min(figures["asking"], figures["engine"]) > 0
    before = [p.clone() for p in learner.model.parameters()]
    seconds, learning, drawn = learner.step()
    assert drawn == 2 * 3 * 6 and 0 < learning < seconds
    assert not all(torch.equal(old, new) for old, new in zip(before, learner.model.parameters(), strict=True))
    counts = learner.policy.asker.engine.counts
    assert counts["generated_tokens"] == pytest.approx((2 * 3 + 1) * drawn)  # three rounds of two sides, and the step

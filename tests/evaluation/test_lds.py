"""The linear datamodeling score: Spearman per held-out example, and how sure that is."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import stats

import reference
from gradsift.evaluation.config import FineTuningConfig, LdsConfig
from gradsift.evaluation.lds import (
    describe_precision,
    linear_datamodeling_scores,
    subset_fine_tunings,
)

RNG = np.random.default_rng(0)


def test_it_is_the_mean_of_spearmans_correlations() -> None:
    losses, foretold = RNG.normal(size=(32, 9)), RNG.normal(size=(32, 9)).round(1)  # with ties
    foretold[:, 0] = 3.0
    [score], pairs = linear_datamodeling_scores({"t": losses}, {("t", "m"): foretold})
    assert score.correlation.value == pytest.approx(reference.datamodeling(losses, foretold))
    assert pairs == []


def test_its_noise_is_that_of_the_jackknife_over_subsets() -> None:
    """With one held-out example, subsets are all that can vary."""
    losses = RNG.normal(size=(32, 1))
    foretold = (RNG.normal(size=(32, 1)) - losses).round(1)
    [score], _ = linear_datamodeling_scores({"t": losses}, {("t", "m"): foretold})
    error = reference.jackknife_error(losses, foretold)
    half = stats.t.isf(0.025, 31) * error
    found = score.correlation
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_it_finds_the_scores_that_add_up_to_the_effect() -> None:
    effect = RNG.normal(size=(100, 6))
    tunings = subset_fine_tunings(100, LdsConfig(subsets=64, sample=80), FineTuningConfig())
    rows = np.array([tuning.rows for tuning in tunings])
    assert rows.shape == (64, 40)
    assert len(np.unique(rows)) == 80
    losses = 5 - effect[rows].sum(axis=1) + RNG.normal(size=(64, 6))
    scores = {"true": effect, "opposite": -effect, "none": RNG.normal(size=(100, 6))}
    foretold = {("t", name): own[rows].sum(axis=1) for name, own in scores.items()}
    found, pairs = linear_datamodeling_scores({"t": losses}, foretold)
    values = {s.method: s.correlation for s in found}
    assert values["true"].low > 0.9
    assert values["opposite"].high < -0.9
    assert values["none"].low < 0.2
    told = {(p.method, p.other): p.found for p in pairs}
    assert list(told) == [("true", "opposite"), ("true", "none"), ("opposite", "none")]
    assert all(found.certain for found in told.values())
    assert told["true", "none"].difference.value == pytest.approx(
        values["true"].value - values["none"].value
    )
    assert subset_fine_tunings(100, LdsConfig(subsets=64, sample=80), FineTuningConfig()) == tunings


def test_methods_that_foretell_the_same_do_not_differ() -> None:
    losses, foretold = RNG.normal(size=(32, 5)), RNG.normal(size=(32, 5))
    both = {("t", "a"): foretold, ("t", "b"): foretold**3}
    _, [pair] = linear_datamodeling_scores({"t": losses}, both)
    assert (pair.found.difference.value, pair.found.p_value) == (0, 1)


def normal(rng: np.random.Generator, num_subsets: int, num_examples: int) -> np.ndarray:
    """Return normal values whose half is common to the examples of a subset."""
    common, own = rng.normal(size=(num_subsets, 1)), rng.normal(size=(num_subsets, num_examples))
    return (common + own) / np.sqrt(2)


@pytest.mark.slow
@pytest.mark.parametrize("quality", [0.0, 0.3, 0.8])
def test_intervals_cover_the_truth(quality: float) -> None:
    """Examples whose Pearson correlation r is known have Spearman's 6/π asin(r/2)."""
    rng, cases, num_examples = np.random.default_rng(1), 200, 30

    def qualities(count: int) -> np.ndarray:
        return quality + rng.uniform(-0.2, 0.2, size=count)

    truth = float(np.mean(6 / np.pi * np.arcsin(qualities(100_000) / 2)))
    covered, told_apart, widths = 0, 0, []
    for _ in range(cases):
        effect, r = normal(rng, 40, num_examples), qualities(num_examples)
        foretold = {("t", m): r * effect + np.sqrt(1 - r**2) * normal(rng, 40, num_examples)
                    for m in "ab"}  # fmt: skip
        [score, _], [pair] = linear_datamodeling_scores({"t": -effect}, foretold)
        covered += score.correlation.low <= truth <= score.correlation.high
        widths.append(score.correlation.high - score.correlation.low)
        told_apart += pair.found.certain
    assert 0.9 <= covered / cases <= 0.99
    assert told_apart / cases <= 0.09
    assert np.mean(widths) / 2 < 0.33  # the bound that is said before


def test_what_subsets_buy_is_said_before() -> None:
    assert "known to ±0.25 if" in describe_precision(64, 100)
    assert "to ±0.03 if each" in describe_precision(64, 100)
    assert "known to ±0.06 if" in describe_precision(1000, 100)


@pytest.mark.slow
def test_a_dozen_methods_take_seconds() -> None:
    losses = RNG.normal(size=(64, 500))
    foretold = {("t", str(n)): RNG.normal(size=(64, 500)) for n in range(12)}
    start = time.process_time()
    linear_datamodeling_scores({"t": losses}, foretold)
    assert time.process_time() - start < 30

"""Intervals that cover what they should, and correlations that are scipy's."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy import stats

from gradsift.evaluation import statistics
from gradsift.evaluation.overlap import jaccard, overlaps
from gradsift.evaluation.statistics import paired_difference, rank_correlation

RNG = np.random.default_rng(0)


def trainings(count: int, shift: float, of_seed: float, shared: np.ndarray) -> list[np.ndarray]:
    """Losses of so many trainings: what examples share, what a seed adds, and noise."""
    return [shared + shift + RNG.normal() * of_seed + RNG.normal(size=len(shared)) * 0.1
            for _ in range(count)]  # fmt: skip


def test_a_difference_is_that_of_token_means() -> None:
    num_tokens = RNG.integers(1, 30, size=50)
    shared = RNG.normal(size=50) + 3
    ours, theirs = trainings(2, -0.5, 0.0, shared), trainings(3, 0.0, 0.0, shared)
    found = paired_difference(ours, theirs, num_tokens)
    expected = sum((np.mean(ours, 0) - np.mean(theirs, 0)) * num_tokens) / num_tokens.sum()
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high < -0.3
    assert paired_difference(ours, ours, num_tokens).value == 0


def test_pairing_takes_out_what_examples_share() -> None:
    num_tokens, shared = np.full(200, 10), RNG.normal(size=200) * 5 + 9
    found = paired_difference(trainings(2, -0.1, 0, shared), trainings(3, 0, 0, shared), num_tokens)
    assert found.high - found.low < 0.1  # five nats of spread between examples do not count


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 3), (3, 5)])
def test_where_nothing_differs_it_says_so(
    counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_RESAMPLES", 400)
    num_tokens, misses, cases = np.full(60, 10), 0, 300
    rng = np.random.default_rng(1)
    monkeypatch.setattr(sys.modules[__name__], "RNG", rng)
    for number in range(cases):
        shared = RNG.normal(size=60) + 3
        sides = [trainings(count, 0.0, 0.05, shared) for count in counts]
        found = paired_difference(*sides, num_tokens, seed=number)
        misses += found.low > 0 or found.high < 0
    # two trainings tell little of their own spread: above the nominal 5 %, and said so in the docs
    assert misses / cases < (0.16 if counts == (2, 3) else 0.12), misses


def test_rank_correlation_is_spearmans() -> None:
    one = RNG.normal(size=40).round(1)  # with ties
    other = one + RNG.normal(size=40)
    found = rank_correlation(one, other)
    expected = stats.spearmanr(one, other).statistic
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high
    assert rank_correlation(one, -one).value == pytest.approx(-1)
    assert rank_correlation(np.ones(40), other).value == 0


def test_overlap_of_every_two() -> None:
    picks = {("t", "a"): (1, 2, 3, 4), ("t", "b"): (3, 4, 5, 6), ("u", "a"): (1, 2, 3, 4)}
    scores = {key: RNG.normal(size=20) for key in picks}
    scores["u", "a"] = scores["t", "a"] * 2
    found = {(o.target, o.method, o.other_target, o.other_method): o
             for o in overlaps(picks, scores)}  # fmt: skip
    assert len(found) == 3
    assert found["t", "a", "t", "b"].jaccard == pytest.approx(2 / 6)
    same = found["t", "a", "u", "a"]
    assert (same.jaccard, same.agreement) == (1, pytest.approx(1))
    assert jaccard([1], [2]) == 0

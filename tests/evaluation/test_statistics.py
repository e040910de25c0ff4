"""Intervals that cover what they should, verdicts that are right often enough, plain sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from gradsift.evaluation.overlap import jaccard, overlaps
from gradsift.evaluation.statistics import (
    Comparison,
    Losses,
    Variance,
    compare_methods,
    compare_reference,
    correlation,
    estimate,
    holm,
    ranks,
)

RNG = np.random.default_rng(0)
CASES = 400
SPREAD = 0.004
"""Standard deviation of a training's loss in the simulated evaluations, nats per token."""


def simulate(rng: np.random.Generator, **world: Any) -> tuple[dict[str, Losses], Losses, Any]:
    """Return made-up losses of nine methods and of random, and the tokens of each example.

    Examples differ in difficulty and length. Half of a training's variance is its own on each
    example, half is common to all examples. `effects`, `noises`: of each method, in standard
    deviations; `selection`, `draw`: what another warm-up, and another random draw, change.
    """
    num_tokens = rng.integers(5, 200, size=80)
    weights = num_tokens / num_tokens.sum()
    common = rng.gamma(4, 0.4, size=80)
    single = np.sqrt(0.5 / (weights**2).sum())

    def noise(*shape: int) -> np.ndarray:
        if world.get("heavy"):
            return rng.standard_t(3, size=shape) / np.sqrt(3)
        return rng.normal(size=shape)

    def losses(
        selections: int, trainings: int, effect: float, scale: float, of_picks: float
    ) -> Any:
        own = np.sqrt(0.5) * noise(selections, trainings, 1)
        own = scale * (own + single * noise(selections, trainings, 80))
        return common + SPREAD * (effect + own + of_picks * noise(selections, 1, 1))

    count, effects = world.get("count", 9), world.get("effects", [0.0] * 9)
    noises, selection = world.get("noises", [1.0] * 9), world.get("selection", 0.0)
    methods = {
        f"method {n}": losses(world.get("selections", 1), 3, effects[n], noises[n], selection)
        for n in range(count)
    }
    return methods, losses(5, 1, 0.0, 1.0, world.get("draw", 0.0)), num_tokens


def rates(**world: Any) -> tuple[float, float, float]:
    """Return how often any method without effect is told apart; those with one; the coverage."""
    rng = np.random.default_rng(1)
    effects = np.array(world.get("effects", [0.0] * 9)[: world.get("count", 9)])
    false, found, covered = 0, [], []
    for _ in range(CASES):
        compared = compare_methods(*simulate(rng, **world)).values()
        certain = np.array([c.certain for c in compared])
        false += bool(certain[effects == 0].any())
        found += (certain & [c.difference.value < 0 for c in compared])[effects != 0].tolist()
        for truth, c in zip(SPREAD * effects, compared, strict=True):
            covered.append(c.difference.low <= truth <= c.difference.high)
    return false / CASES, float(np.mean(found)) if found else 0.0, float(np.mean(covered))


@pytest.mark.slow
@pytest.mark.parametrize(
    "world",
    [
        {}, {"draw": 1.0}, {"heavy": True}, {"noises": [3.0] + [1.0] * 8},
        {"selections": 3, "selection": 1.0}, {"selections": 3, "selection": 3.0, "draw": 3.0},
    ],
    ids=["plain", "draw", "heavy tails", "one noisy", "warm-up seeds", "picks vary most"],
)  # fmt: skip
def test_where_nothing_differs_it_says_so(world: dict[str, Any]) -> None:
    false, _, coverage = rates(**world)
    assert false <= (0.07 if "noises" not in world else 0.09)  # 0.061 in 3,000 cases
    assert 0.935 <= coverage <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effects", "least"),
    [([-2.0] * 9, 0.36), ([-2.0] * 3 + [0.0] * 6, 0.29), ([-2.0] + [0.0] * 8, 0.27),
     ([-3.0] + [0.0] * 8, 0.65)],
    ids=["all", "three", "one", "one of three deviations"],
)  # fmt: skip
def test_what_differs_is_found(effects: list[float], least: float) -> None:
    false, found, coverage = rates(effects=effects)
    assert false <= 0.07
    assert found >= least
    assert 0.935 <= coverage <= 0.98


@pytest.mark.slow
def test_of_two_methods_one_that_helps_is_found_more_often_than_of_nine() -> None:
    few = rates(effects=[-2.0], count=1)[1]
    assert few > 0.5
    assert few > rates(effects=[-2.0] + [0.0] * 8)[1] + 0.1


@pytest.mark.slow
def test_a_warm_up_that_changes_the_picks_widens_the_interval() -> None:
    rng = np.random.default_rng(3)
    methods, at_random, num_tokens = simulate(rng, selections=3, selection=4.0)
    blind = {name: losses[:1] for name, losses in methods.items()}
    wide, narrow = (compare_methods(m, at_random, num_tokens) for m in (methods, blind))

    def width(found: dict[str, Comparison]) -> float:
        return float(np.mean([c.difference.high - c.difference.low for c in found.values()]))

    assert width(wide) > 1.5 * width(narrow)


def losses_of(count: int, shift: float, shared: np.ndarray, noise: float = 0.1) -> Losses:
    """Losses of so many trainings on one selection: what examples share, and noise."""
    return (shared + shift + RNG.normal(size=(count, len(shared))) * noise)[None]


def test_a_difference_is_that_of_token_means() -> None:
    num_tokens, shared = RNG.integers(1, 30, size=50), RNG.normal(size=50) + 3
    ours, theirs = losses_of(3, -0.5, shared), losses_of(5, 0.0, shared).transpose(1, 0, 2)
    found = compare_methods({"m": ours}, theirs, num_tokens)["m"]
    expected = sum((ours[0].mean(0) - theirs[:, 0].mean(0)) * num_tokens) / num_tokens.sum()
    assert found.difference.value == pytest.approx(expected)
    assert found.difference.low < found.difference.value < found.difference.high < -0.3
    assert found.certain
    same = compare_reference(theirs, theirs, num_tokens)
    assert (same.difference.value, same.p_value) == (0, 1)


def test_pairing_takes_out_what_examples_share() -> None:
    num_tokens, shared = np.full(200, 10), RNG.normal(size=200) * 5 + 9
    theirs = losses_of(5, 0, shared).transpose(1, 0, 2)
    found = compare_methods({"m": losses_of(2, -0.1, shared)}, theirs, num_tokens)["m"].difference
    assert found.high - found.low < 0.1  # five nats of spread between examples do not count


def test_many_examples_leave_the_plain_t_test_of_pooled_variances() -> None:
    """Where examples add nothing, the interval is that of the formula in the docs."""
    num_tokens, constant = np.full(10, 7), np.ones(10)
    means = {"a": [1.0, 1.1, 1.3], "b": [2.0, 2.2, 2.1]}
    at_random = np.array([1.5, 1.7, 1.6, 1.9, 1.4])
    methods = {name: np.array(own)[None, :, None] * constant for name, own in means.items()}
    found = compare_methods(methods, at_random[:, None, None] * constant, num_tokens)
    pooled = np.mean([np.var(own, ddof=1) for own in means.values()])
    parts = (pooled / 3, np.var(at_random, ddof=1) / 5)
    df = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 4)
    half = stats.t.isf(0.025, df) * np.sqrt(sum(parts))
    for name, own in means.items():
        gap = np.mean(own) - at_random.mean()
        interval = found[name].difference
        assert (interval.low, interval.high) == pytest.approx((gap - half, gap + half))
    p_values = [2 * stats.t.sf(abs(np.mean(own) - at_random.mean()) / np.sqrt(sum(parts)), df)
                for own in means.values()]  # fmt: skip
    assert [c.p_value for c in found.values()] == pytest.approx(holm(p_values))


def test_the_base_model_has_no_noise_of_its_own() -> None:
    num_tokens, constant = np.full(10, 7), np.ones(10)
    at_random = np.array([1.5, 1.7, 1.6, 1.9, 1.4])
    base = np.full((1, 1, 10), 2.0)
    found = compare_reference(base, at_random[:, None, None] * constant, num_tokens)
    expected = stats.ttest_1samp(2.0 - at_random, 0)
    assert found.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(interval))


def test_estimates_without_noise() -> None:
    assert estimate(0.0, [Variance(0.0, 3)]).p_value == 1
    assert estimate(0.1, [Variance(0.0, 3)]).p_value == 0


def test_holm_is_the_textbooks() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_rank_correlation_is_spearmans() -> None:
    one = RNG.normal(size=40).round(1)  # with ties
    other = one + RNG.normal(size=40)
    expected = stats.spearmanr(one, other).statistic
    found = correlation(ranks(np.stack([one, one, one * 0])), ranks(np.stack([other, -one, other])))
    assert found.tolist() == pytest.approx([expected, -1, 0])


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

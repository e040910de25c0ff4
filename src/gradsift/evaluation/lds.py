"""The linear datamodeling score: do a method's scores add up to what training on them does?

Fine-tunings on random subsets of the pool. For every held-out example, Spearman's correlation over
the subsets of what a method foretells (the sum of its scores for that example) with how low the
example's loss is; then the mean over the examples (Park et al., 2023, arXiv 2303.14186). No
selection has to be any good for it to tell methods apart.

How sure it is: the jackknife over subsets, because subsets drawn with replacement tie with
themselves, and the spread over examples. Both come from the same pseudo-values (Tukey, 1958), and
so do the differences between methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy import stats

from gradsift.evaluation.config import FineTuningConfig, LdsConfig
from gradsift.evaluation.fine_tunings import FineTuning
from gradsift.evaluation.statistics import (
    Comparison,
    Interval,
    Variance,
    correlation,
    estimate,
    examples_beyond_units,
    holm,
    ranks,
)

BySubset = Float[np.ndarray, "subset example"]


@dataclass(frozen=True)
class LinearDatamodelingScore:
    """What a method's scores are worth for a target; positive: higher sums, lower losses."""

    target: str
    method: str
    correlation: Interval


@dataclass(frozen=True)
class DatamodelingPair:
    """How much higher a method's score is than another's; corrected after Holm for all pairs."""

    target: str
    method: str
    other: str
    found: Comparison


def subset_fine_tunings(
    num_pool: int, lds: LdsConfig, training: FineTuningConfig
) -> list[FineTuning]:
    """Return the fine-tunings on random subsets, of the same steps, seed and first weights."""
    rng = np.random.default_rng(lds.seed)
    count = min(lds.sample or num_pool, num_pool)
    sample = rng.choice(num_pool, size=count, replace=False)
    size = max(1, round(lds.share * count))
    subsets = [rng.choice(sample, size=size, replace=False) for _ in range(lds.subsets)]
    return [
        FineTuning(tuple(np.sort(rows).tolist()), training.steps, lds.seed, f"subset {number}")
        for number, rows in enumerate(subsets, start=1)
    ]


def linear_datamodeling_scores(
    losses: Mapping[str, BySubset], predictions: Mapping[tuple[str, str], BySubset]
) -> tuple[list[LinearDatamodelingScore], list[DatamodelingPair]]:
    """Return the score of every target and method, and the differences between every two.

    `losses`: by target; `predictions`: by target and method, higher where a lower loss is foretold.
    """
    scores, pairs = [], []
    for target, own_losses in losses.items():
        methods = [method for name, method in predictions if name == target]
        values = {m: _spearman(predictions[target, m], -own_losses) for m in methods}
        pseudo = {m: _pseudo_values(predictions[target, m], -own_losses) for m in methods}
        for method in methods:
            found = _mean(values[method], pseudo[method]).difference
            scores.append(LinearDatamodelingScore(target, method, _within_one(found)))
        differences = {
            (one, other): _mean(values[one] - values[other], pseudo[one] - pseudo[other])
            for one, other in combinations(methods, 2)
        }
        corrected = holm([found.p_value for found in differences.values()])
        for (names, found), p_value in zip(differences.items(), corrected, strict=True):
            pairs.append(DatamodelingPair(target, *names, Comparison(found.difference, p_value)))
    return scores, pairs


def describe_precision(num_subsets: int, num_examples: int) -> str:
    """Return what so many subsets and held-out examples will tell, known before any training.

    Bounds for a method whose scores say nothing, the least certain case: a correlation over N
    subsets varies by 1/√(N - 1), and a mean over examples by as much if their losses rise and fall
    together, by √M less if each goes its own way.

    >>> describe_precision(64, 400)
    '64 subsets and 400 held-out examples: a linear datamodeling score of methods that foretell
    nothing is known to ±0.25 if the losses of all held-out examples rise and fall together, to
    ±0.01 if each goes its own way'
    """
    worst = float(stats.t.isf(0.025, num_subsets - 1)) / np.sqrt(num_subsets - 1)
    return (
        f"{num_subsets} subsets and {num_examples:,} held-out examples: a linear datamodeling "
        f"score of methods that foretell nothing is known to ±{worst:.2f} if the losses of all "
        f"held-out examples rise and fall together, to ±{worst / np.sqrt(num_examples):.2f} if "
        "each goes its own way"
    )


def _spearman(one: BySubset, other: BySubset) -> Float[np.ndarray, " example"]:
    return correlation(ranks(one.T), ranks(other.T))


def _pseudo_values(one: BySubset, other: BySubset) -> BySubset:
    """Return N times each example's correlation less N-1 times that without each subset."""
    count = len(one)
    sides = [(side.T, ranks(side.T)) for side in (one, other)]
    without = np.stack(
        [correlation(*(_ranks_without(*side, left_out) for side in sides))
         for left_out in range(count)]
    )  # fmt: skip
    return count * _spearman(one, other) - (count - 1) * without


def _ranks_without(
    rows: Float[np.ndarray, "example subset"],
    ranked: Float[np.ndarray, "example subset"],
    left_out: int,
) -> Float[np.ndarray, "example other_subset"]:
    """Return the ranks of the other subsets once one is left out, without sorting again."""
    gone = rows[:, left_out, None]
    changed = ranked - (rows > gone) - 0.5 * (rows == gone)
    return np.delete(changed, left_out, axis=1)


def _mean(values: Float[np.ndarray, " example"], pseudo: BySubset) -> Comparison:
    """Return the mean over examples, sure by what subsets and what examples vary it."""
    num_subsets, num_examples = pseudo.shape
    weights = np.full(num_examples, 1 / num_examples)
    of_subsets = Variance(float(np.var(pseudo @ weights, ddof=1)) / num_subsets, num_subsets - 1)
    of_examples = examples_beyond_units(pseudo.mean(axis=0), [pseudo], weights)
    return estimate(float(values.mean()), [of_subsets, of_examples])


def _within_one(found: Interval) -> Interval:
    """Return the interval within the values that a correlation can have."""
    return Interval(found.value, max(found.low, -1.0), min(found.high, 1.0))

"""How sure a difference is: bootstrap over test examples and seeds, and over subsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

_RESAMPLES = 4000
_TAILS = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def paired_difference(
    ours: Sequence[Float[np.ndarray, " example"]],
    theirs: Sequence[Float[np.ndarray, " example"]],
    num_tokens: Int[np.ndarray, " example"],
    seed: int = 0,
) -> Interval:
    """Return the difference of two mean losses per token, a row of losses for each training.

    Test examples are drawn with replacement, the same for both sides, and trainings of each side.
    A few trainings drawn from themselves vary too little by (n-1)/n; their deviations are widened
    by the root of its inverse (Davison and Hinkley, 1997).
    """
    rng = np.random.default_rng(seed)
    num_examples = len(num_tokens)
    drawn = rng.multinomial(num_examples, np.full(num_examples, 1 / num_examples), _RESAMPLES)
    weights = drawn * num_tokens
    weights = weights / weights.sum(axis=1, keepdims=True)
    sides = [_resampled(np.stack(rows), weights, rng) for rows in (ours, theirs)]
    means = [
        float(np.average(np.mean(rows, axis=0), weights=num_tokens)) for rows in (ours, theirs)
    ]
    low, high = np.percentile(sides[0] - sides[1], _TAILS)
    return Interval(means[0] - means[1], float(low), float(high))


def _resampled(
    losses: Float[np.ndarray, "training example"],
    weights: Float[np.ndarray, "resample example"],
    rng: np.random.Generator,
) -> Float[np.ndarray, " resample"]:
    each = weights @ losses.T
    num_trainings = each.shape[1]
    mean = each.mean(axis=1)
    if num_trainings == 1:
        return mean
    drawn = rng.integers(num_trainings, size=each.shape)
    moved = np.take_along_axis(each, drawn, axis=1).mean(axis=1) - mean
    return mean + moved * np.sqrt(num_trainings / (num_trainings - 1))


def rank_correlation(
    one: Float[np.ndarray, " subset"], other: Float[np.ndarray, " subset"], seed: int = 0
) -> Interval:
    """Return Spearman's correlation, its interval from subsets drawn with replacement.

    A side that is the same for all subsets tells nothing: the correlation is then 0.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(one), size=(_RESAMPLES, len(one)))
    low, high = np.percentile(correlation(ranks(one[drawn]), ranks(other[drawn])), _TAILS)
    value = correlation(ranks(one[None]), ranks(other[None]))[0]
    return Interval(float(value), float(low), float(high))


def ranks(rows: Float[np.ndarray, "row item"]) -> Float[np.ndarray, "row item"]:
    """Return the ranks within each row, of ties their mean.

    >>> ranks(np.array([[3.0, 1.0, 1.0]]))
    array([[3. , 1.5, 1.5]])
    """
    return stats.rankdata(rows, axis=1)


def correlation(
    one: Float[np.ndarray, "row item"], other: Float[np.ndarray, "row item"]
) -> Float[np.ndarray, " row"]:
    """Return Pearson's correlation of each two rows; of ranks it is Spearman's.

    0 where a row is the same throughout.
    """
    left, right = (side - side.mean(axis=1, keepdims=True) for side in (one, other))
    lengths = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    return np.divide((left * right).sum(axis=1), lengths, where=lengths > 0, out=lengths * 0)

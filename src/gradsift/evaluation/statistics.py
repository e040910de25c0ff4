"""How sure a difference is: noise of held-out examples, of trainings and of picks, kept apart.

Every interval here is an estimate ± a quantile of t times its standard error. The variance is a sum
of parts, each with its own degrees of freedom, put together after Welch and Satterthwaite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

_LEVEL = 0.05
Losses = Float[np.ndarray, "_ _ example"]
"""Losses on held-out examples: by selection of a method and training on it."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, which no other comparison widens."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A difference, and how often chance alone would give one as large.

    `p_value`: two-sided; of methods after Holm's correction.
    """

    difference: Interval
    p_value: float

    @property
    def certain(self) -> bool:
        """Whether the difference is beyond the noise, at 5 %."""
        return self.p_value < _LEVEL


class Variance(NamedTuple):
    """Of an estimate, known to so many degrees of freedom."""

    value: float
    df: float


def compare_methods(
    methods: Mapping[str, Losses],
    at_random: Losses,
    num_tokens: Int[np.ndarray, " example"],
) -> dict[str, Comparison]:
    """Return each method's loss per token less that of random selections.

    What trainings vary by is pooled over the methods: they are the same procedure on as many picks.
    Where a method has several selections, what these vary by takes its place, and holds both
    noises. Random selections have their own, which holds that of the draw.

    The p-values are corrected after Holm for the number of methods.
    """
    noise = _training_noise(methods, num_tokens / num_tokens.sum())
    found = {
        name: _compare(losses, at_random, num_tokens, noise[name])
        for name, losses in methods.items()
    }
    corrected = holm([comparison.p_value for comparison in found.values()])
    return {
        name: Comparison(comparison.difference, p_value)
        for (name, comparison), p_value in zip(found.items(), corrected, strict=True)
    }


def compare_reference(
    losses: Losses, at_random: Losses, num_tokens: Int[np.ndarray, " example"]
) -> Comparison:
    """Return the same for what is no method: its own noise, none for a single training."""
    return _compare(losses, at_random, num_tokens, _own(losses, num_tokens / num_tokens.sum()))


def estimate(value: float, parts: Sequence[Variance]) -> Comparison:
    """Return an estimate with its interval, and the p-value of its being zero."""
    variance = sum(part.value for part in parts)
    if variance <= 0:
        return Comparison(Interval(value, value, value), float(value == 0))
    df = variance**2 / sum(part.value**2 / part.df for part in parts)
    error = float(np.sqrt(variance))
    half = float(stats.t.isf(_LEVEL / 2, df)) * error
    p_value = float(2 * stats.t.sf(abs(value) / error, df))
    return Comparison(Interval(value, value - half, value + half), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for number, place in enumerate(order):
        largest = max(largest, min(1.0, p_values[place] * (len(order) - number)))
        corrected[place] = largest
    return corrected


def examples_beyond_units(
    mean: Float[np.ndarray, " example"],
    sides: Sequence[Float[np.ndarray, "_ example"]],
    weights: Float[np.ndarray, " example"],
) -> Variance:
    """Return what the draw of examples adds to the variance of a weighted mean over them.

    `mean`: what is averaged over examples, a sum or difference of the sides' means over their
    units (trainings, subsets). What single units do on single examples is in the variance of the
    units already, and is not counted twice. `weights` sum to 1.
    """
    twice = 0.0
    for rows in sides:
        if len(rows) > 1:
            own = _variance_of_mean(rows - rows.mean(axis=0), weights)
            twice += float(own.sum()) / (len(rows) * (len(rows) - 1))
    whole = float(_variance_of_mean(mean[None], weights)[0])
    return Variance(max(whole - twice, 0.0), max(len(weights) - 1, 1))


def _variance_of_mean(
    rows: Float[np.ndarray, "row example"], weights: Float[np.ndarray, " example"]
) -> Float[np.ndarray, " row"]:
    """Return the linearised variance of each row's weighted mean; 0 for a single example."""
    count = len(weights)
    deviations = rows - (rows @ weights)[:, None]
    return deviations**2 @ weights**2 * (count / max(count - 1, 1))


def _compare(
    ours: Losses, theirs: Losses, num_tokens: Int[np.ndarray, " example"], noise: Variance
) -> Comparison:
    weights = num_tokens / num_tokens.sum()
    sides = [_units(ours), _units(theirs)]
    mean = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    of_examples = examples_beyond_units(mean, sides, weights)
    return estimate(float(mean @ weights), [noise, _own(theirs, weights), of_examples])


def _units(losses: Losses) -> Float[np.ndarray, "unit example"]:
    """Return what varies freely: the selections, or the trainings on the only one."""
    return losses.mean(axis=1) if len(losses) > 1 else losses[0]


def _own(losses: Losses, weights: Float[np.ndarray, " example"]) -> Variance:
    """Return the variance of the mean loss from its own units; none for a single one."""
    units = _units(losses) @ weights
    if len(units) == 1:
        return Variance(0.0, 1)
    return Variance(float(np.var(units, ddof=1)) / len(units), len(units) - 1)


def _training_noise(
    methods: Mapping[str, Losses], weights: Float[np.ndarray, " example"]
) -> dict[str, Variance]:
    """Return the variance of each method's mean loss: a nested analysis of variance, pooled."""
    # methods that pick the same share their fine-tunings: these tell of the noise once
    alike = {losses.tobytes(): name for name, losses in methods.items()}
    means = {name: methods[name] @ weights for name in alike.values()}
    within = _pooled({name: _mean_square(own, own.shape[1] - 1) for name, own in means.items()})
    between = _pooled(
        {
            name: Variance(own.shape[1] * float(own.mean(axis=1).var(ddof=1)), len(own) - 1)
            for name, own in means.items()
            if len(own) > 1
        }
    )
    of_mean = {
        name: Variance(noise.value / means[name].size, noise.df)
        for name, noise in (within | between).items()
    }
    return {name: of_mean[alike[losses.tobytes()]] for name, losses in methods.items()}


def _mean_square(means: Float[np.ndarray, "selection training"], df: int) -> Variance:
    return Variance(float(means.var(axis=1, ddof=1).mean()), len(means) * df)


def _pooled(own: Mapping[str, Variance]) -> dict[str, Variance]:
    """Return the mean square that all have in common, for each.

    One that scatters more than the others together, by an F-test at 5 %, keeps its own: pooled, it
    would seem three times as sure as it is.
    """
    squares, df = sum(v.value * v.df for v in own.values()), sum(v.df for v in own.values())
    found = {}
    for name, (value, own_df) in own.items():
        others = (squares - value * own_df, df - own_df)
        alone = others[1] > 0 and value * others[1] > others[0] * float(
            stats.f.isf(_LEVEL, own_df, others[1])
        )
        found[name] = Variance(value, own_df) if alone else Variance(squares / df, df)
    return found


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

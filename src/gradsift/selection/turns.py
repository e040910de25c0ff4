"""Columns of similarities as a policy goes through them: sorted no further than picks reach.

A pool is far longer than a budget. Of each column only the best rows are sorted, and more of them
when they are used up, so that the order is that of a full stable sort at a part of its cost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import ConfigError

_GROWTH = 8  # how many times further a column is sorted when its sorted rows are used up
_LOOKED_AT = 64  # rows, in search of one that is not gone


class Ranked:
    """One column's rows by falling value, gone through once; ties go to the row that comes first.

    Values are finite or −∞; rows of −∞ are left out.
    """

    def __init__(self, values: Float[np.ndarray, " row"], num_expected: int) -> None:
        """Take the column, and how many rows of it are likely to come up."""
        self._values, self._num_expected = values, num_expected
        self._num_ranked = int(np.isfinite(values).sum())
        self._sorted: Int[np.ndarray, " rank"] = np.empty(0, np.int64)
        self._place = 0

    def best_left(self, gone: Bool[np.ndarray, " row"]) -> int | None:
        """Return the first row that is not gone; none where all are.

        What is gone once stays gone.
        """
        while len(ahead := self.upcoming(_LOOKED_AT)):
            left = np.flatnonzero(~gone[ahead])
            if len(left):
                self._place += int(left[0])
                return int(ahead[left[0]])
            self._place += len(ahead)
        return None

    def upcoming(self, count: int) -> Int[np.ndarray, " rank"]:
        """Return the next rows, gone or not: so many, or as many as there are."""
        stop = min(self._place + count, self._num_ranked)
        if len(self._sorted) < stop:
            further = max(stop, _GROWTH * len(self._sorted), self._num_expected)
            self._sorted = _best(self._values, min(further, self._num_ranked))
        return self._sorted[self._place : stop]


def _best(values: Float[np.ndarray, " row"], count: int) -> Int[np.ndarray, " rank"]:
    """Return the first `count` rows of a stable sort by falling value."""
    place = len(values) - count
    lowest = np.partition(values, place)[place]
    rows = np.flatnonzero(values >= lowest)  # with all ties at the end, of which the first count
    return rows[np.argsort(-values[rows], kind="stable")][:count]


def take_turns(num_rankings: int, pick_from: Callable[[int], int | None]) -> None:
    """Pick from each column in turn until none gives a row any more."""
    while [row for ranking in range(num_rankings) if (row := pick_from(ranking)) is not None]:
        pass


def serve_the_least(
    rankings: Float[np.ndarray, "row ranking"], pick_from: Callable[[int], int | None]
) -> None:
    """Pick each time from the column that the picks so far serve least (after BIDS).

    A column's values are normalised over the pool to mean 0 and deviation 1, so that it does not
    count how large similarities with one target are; each pick adds its normalised values to what
    every column has been served; ties go to the first column. Columns without spread, and those
    of −∞, say nothing of any example and have no turn.

    Source: after Dai et al., 2025, arXiv 2501.12147.

    Raises:
        ConfigError: If no column has any spread.
    """
    moments = np.array([_mean_and_deviation(column) for column in rankings.T])
    kept = np.flatnonzero(moments[:, 1] > 0)
    if not len(kept):
        raise ConfigError(
            "policy.strategy=balanced needs similarities that differ from one pool example to "
            "another, found the same for all of them; use policy.strategy=top"
        )
    means, deviations = moments[kept].T
    served = np.zeros(len(kept))
    while served.min() < np.inf:
        least = int(served.argmin())
        row = pick_from(int(kept[least]))
        if row is None:
            served[least] = np.inf
        else:
            served += (rankings[row, kept] - means) / deviations


def _mean_and_deviation(values: Float[np.ndarray, " row"]) -> tuple[float, float]:
    """Return both over the finite values; a deviation of 0 where all of them are the same."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() == finite.max():
        return 0.0, 0.0
    return float(finite.mean(dtype=np.float64)), float(finite.std(dtype=np.float64))

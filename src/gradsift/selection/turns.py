"""Columns of similarities as a policy goes through them: sorted no further than picks reach.

A pool is far longer than a budget. Of each column only the best rows are sorted, and more of them
when they are used up, so that the order is that of a full stable sort at a part of its cost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import ConfigError

_GROWTH = 4  # how many times further a column is sorted when its sorted rows are used up


class Ranked:
    """The rows of one column by falling value; ties go to the row that comes first.

    Values are finite or −∞; rows of −∞ are left out.
    """

    def __init__(self, values: Float[np.ndarray, " row"], num_expected: int) -> None:
        """Take the column, and how many rows of it are likely to come up."""
        self._values, self._num_expected = values, num_expected
        self._num_ranked = int(np.isfinite(values).sum())
        self._sorted: Int[np.ndarray, " rank"] = np.empty(0, np.int64)

    def row(self, place: int) -> int | None:
        """Return the row at a place, counted from 0; none behind the last."""
        if place >= len(self._sorted) and not self._sort_beyond(place):
            return None
        return int(self._sorted[place])

    def rows(self, start: int, stop: int) -> Int[np.ndarray, " rank"]:
        """Return the rows at some places, as far as there are any."""
        self._sort_beyond(stop - 1)
        return self._sorted[start:stop]

    def _sort_beyond(self, place: int) -> bool:
        """Sort so far that the row at a place is known; return whether there is one."""
        if len(self._sorted) <= place and len(self._sorted) < self._num_ranked:
            further = max(place + 1, _GROWTH * len(self._sorted), self._num_expected)
            self._sorted = _best(self._values, min(further, self._num_ranked))
        return place < len(self._sorted)


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

"""Where picks come from, beside where the pool comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class SourceShare:
    """What one source of the pool has among the picks and in the pool, as shares of the rows."""

    source: str
    num_picks: int
    of_picks: float
    of_pool: float

    @property
    def lift(self) -> float:
        """How many times as frequent it is among the picks as in the pool."""
        return self.of_picks / self.of_pool


def source_shares(
    pool: pa.Array | pa.ChunkedArray, picks: pa.Array | pa.ChunkedArray
) -> list[SourceShare]:
    """Return where picks come from, the largest source first, given every example's source."""
    in_pool, in_picks = (Counter(dict(_counted(sources))) for sources in (pool, picks))
    return [
        SourceShare(source, count, count / in_picks.total(), in_pool[source] / in_pool.total())
        for source, count in in_picks.most_common()
    ]


def _counted(names: pa.Array | pa.ChunkedArray) -> Iterator[tuple[str, int]]:
    for pair in names.cast(pa.string()).value_counts().to_pylist():
        yield pair["values"], pair["counts"]

"""Seconds and memory of picking 5 % of ten million examples by the columns of 64 target examples.

    python benchmarks/picking.py            # each case in a process of its own

The columns are random: once each by itself, once with most of their spread in common, so that all
of them want the same examples and each has to look far down.
"""

from __future__ import annotations

import multiprocessing
import resource
import time

import numpy as np
import pyarrow as pa
from rich.console import Console

from gradsift.config import PolicyConfig
from gradsift.data.duplicates import DedupColumns
from gradsift.selection.policies import Candidates, pick

ROWS, COLUMNS, IN_COMMON = 10_000_000, 64, 0.8
say = Console(soft_wrap=True, highlight=False).print


def measure(strategy: str, in_common: float) -> None:
    """Pick once and print what it took."""
    rng = np.random.default_rng(0)
    rankings = np.empty((ROWS, COLUMNS), np.float32, order="F")
    shared = in_common * rng.standard_normal(ROWS, dtype=np.float32)
    for column in rankings.T:
        column[:] = shared + (1 - in_common) * rng.standard_normal(ROWS, dtype=np.float32)
    pool = Candidates(_texts(ROWS), pa.array(["s"]).take(pa.nulls(ROWS, pa.int32()).fill_null(0)),
                      np.full(ROWS, 12))  # fmt: skip
    policy = PolicyConfig(strategy=strategy, decontaminate="exact")  # type: ignore[arg-type]
    before, wall, own = _peak(), time.perf_counter(), time.process_time()
    count = len(pick(rankings, pool, _texts(1), policy).rows)
    say(
        f"{strategy}, {in_common:.0%} in common: {count:,} picks in "
        f"{time.perf_counter() - wall:.1f} s, {time.process_time() - own:.1f} s of one core, "
        f"{_peak() - before:.2f} GiB above the {before:.2f} GiB of its input"
    )


def _texts(count: int) -> DedupColumns:
    """Return examples of which none repeats another."""
    hashes = np.stack([np.arange(count), np.arange(count) * 7919 + count], axis=1)
    hashed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), count, [None, pa.py_buffer(hashes.tobytes())]
    )
    return DedupColumns(hashed, hashed, hashed, conversations=lambda rows: [])


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    for in_common in (0.0, IN_COMMON):
        for strategy in ("round-robin", "balanced"):
            process = multiprocessing.Process(target=measure, args=(strategy, in_common))
            process.start()
            process.join()

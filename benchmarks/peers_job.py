"""What each side of `peers.py` is given, in a folder, and leaves there; needs no gradsift."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Sequence[int]]
"""`input_ids`, and `labels` as transformers wants them: -100 where the loss does not count."""


class Job:
    """One model with its adapter, one pool and one set of queries, under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.adapter = folder / "base", folder / "adapter"

    def rows(self, name: str) -> list[dict[str, list[int]]]:
        """Return the `pool` or the `queries`."""
        lines = (self.folder / f"{name}.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def write_rows(self, name: str, rows: Sequence[Row]) -> None:
        """Keep the `pool` or the `queries`."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / f"{name}.jsonl").write_text(text, "utf-8")

    def write(self, side: str, cosines: np.ndarray, seconds: float, **facts: Any) -> None:
        """Keep cosines (pool example × query), seconds, and the most memory of this process."""
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        np.save(self.folder / f"{side}.npy", cosines.astype(np.float32))
        figures = {"seconds": seconds, "memory": memory, **facts}
        (self.folder / f"{side}.json").write_text(json.dumps(figures), "utf-8")

    def read(self, side: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Return what `write` kept."""
        figures = json.loads((self.folder / f"{side}.json").read_text("utf-8"))
        return np.load(self.folder / f"{side}.npy"), figures


class Clock:
    """Starts when it is first asked to; `seconds` until now."""

    def __init__(self) -> None:
        self._started: float | None = None

    def start(self) -> None:
        """Start, unless it runs already."""
        self._started = self._started or time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        assert self._started is not None
        return time.perf_counter() - self._started


def batches_of(rows: Sequence[Row], tokens: int) -> list[list[int]]:
    """Return indices of rows, longest first, in batches of up to `tokens` padded tokens."""
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])):
        longest = len(rows[batches[-1][0]]["input_ids"]) if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches

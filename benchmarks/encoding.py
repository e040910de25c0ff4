"""Encoding a pool by one process and by several, in turn: seconds, memory, the same bytes.

    python benchmarks/encoding.py FOLDER --rows 1000000 --turns 1      # of ../shared, repeated

Each time in a process of its own. What one process does is what all did before: its tokenizer
uses threads.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from gradsift.config import DataConfig, EngineConfig, ModelConfig
from gradsift.data.encoded import encode_set
from gradsift.data.groups import GroupEncoder
from gradsift.data.sources import resolve
from gradsift.executors.local import Local
from gradsift.models.loading import load_encoder
from gradsift.runs.provenance import peak_memory

say = Console(soft_wrap=True, highlight=False).print
SHARED = Path(__file__).parents[2] / "shared"


class OneProcess(Local):
    """All of it here."""

    def stream(self, work: Any, items: Iterable[Any]) -> Iterator[Any]:
        """Do one after the other."""
        return map(work, items)


SIDES = {"one": OneProcess(), "several": Local()}


def encode(side: str, pool: Path, out: Path) -> None:
    """Encode, and print seconds, MiB here and of the largest other process, and a hash."""
    data = DataConfig.build({"pool": str(pool)})
    load = partial(
        load_encoder, ModelConfig(name=str(SHARED / "models/base")), data, EngineConfig()
    )
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    encode_set("pool", resolve((str(pool),)), GroupEncoder(load, {}), out, executor=SIDES[side])
    seconds = time.perf_counter() - started
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    with (out / "pool.parquet").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    say(f"{seconds} {peak_memory() / 2**20} {others} {digest}")


def compare(folder: Path, rows: int, turns: int) -> None:
    """Run both sides in turn and print their medians."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = folder / f"pool-{rows}.jsonl"
    if not pool.exists():
        lines = (SHARED / "data/pool.jsonl").read_bytes().splitlines(keepends=True)
        with pool.open("wb") as file:
            file.writelines(islice(cycle(lines), rows))
    found: dict[str, list[list[str]]] = {side: [] for side in SIDES}
    for _ in range(turns):
        for side, results in found.items():
            command = [sys.executable, __file__, str(folder), "--rows", str(rows), "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append(done.stdout.split())
            say(f"{side}: " + "{:.1f} s, {:.0f} MiB, others {:.0f} MiB".format(
                *map(float, results[-1][:3])))  # fmt: skip
    hashes = {result[3] for results in found.values() for result in results}
    if len(hashes) > 1:
        raise SystemExit("they wrote different bytes")
    one, several = (median(float(result[0]) for result in found[side]) for side in SIDES)
    say(f"{rows:,} rows: {one:.1f} s by one process, {several:.1f} s by several: "
        f"{one / several:.2f} times; the same bytes")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.side:
        pool = arguments.folder / f"pool-{arguments.rows}.jsonl"
        encode(arguments.side, pool, arguments.folder / arguments.side)
    else:
        compare(arguments.folder, arguments.rows, arguments.turns)

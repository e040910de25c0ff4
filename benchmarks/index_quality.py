"""How near an index comes to the pass over the pool, and how long it takes to ask it.

    python benchmarks/index_quality.py FOLDER --rows 4000    # ../shared: base model, so many rows
    python benchmarks/index_quality.py FOLDER --query 10000000 --dimension 1024      # made up

For each dimension an index is made and asked for four targets by `gist` (`norm_power` 0 and 1) and
`cosine`, and compared with the exact scores: Spearman's correlation over the pool, Jaccard
similarity of the best 5 %. With `--query N` an index of N made-up sketches is read for a target of
64 examples: seconds and peak memory. Killed, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

import gradsift
from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.executors.local import Local
from gradsift.pool.pool_pass import PoolPass
from gradsift.pool.shards import plan_shards, save_shard, shard_size
from gradsift.pool.sketches import StoredSketches
from gradsift.runs.folder import Run
from gradsift.runs.opening import locked_run
from gradsift.runs.provenance import peak_memory
from gradsift.runs.stage import Stage
from gradsift.sections import merge

say = Console(soft_wrap=True, highlight=False).print
SHARED = Path(__file__).parents[2] / "shared"
TARGETS = ("gsm8k", "sql", "emotion", "bbh")
SETTINGS = {
    "lora": {"rank": 16},
    "warmup": {"learning_rate": 1e-3},
    "policy": {"decontaminate": "none"},
}
WAYS = {
    "gist": ("gist", {"gist": {"norm_power": 0}}),
    "gist, norm_power 1": ("gist", {"gist": {"norm_power": 1}}),
    "cosine": ("cosine", {}),
}
DIRECTIONS = 64


def quality(folder: Path, dimensions: list[int], rows: int) -> None:
    """Print a row for each dimension, way and target."""
    lines, pool = (SHARED / "data/pool.jsonl").read_bytes().splitlines(True), folder / "pool.jsonl"
    drawn = np.random.default_rng(0).permutation(len(lines))[:rows]
    pool.write_bytes(b"".join(lines[row] for row in np.sort(drawn)))
    given = {"model": str(SHARED / "models/base"), "pool": str(pool)}
    target = {name: str(SHARED / "data/targets" / name / "val.jsonl") for name in TARGETS}
    exact = {}
    for way, (method, settings) in WAYS.items():
        out = folder / "exact"
        own = merge(SETTINGS, settings)
        exact[way] = _scores(
            gradsift.select(**given, target=target, output_dir=out, method=method, settings=own)
        )
    say("| numbers | bytes | off by, expected | way | target | Spearman | Jaccard | seconds |")
    for dimension in dimensions:
        path = folder / f"index-{dimension}"
        settings = merge(SETTINGS, {"index": {"dimension": dimension}})
        gradsift.index(path, **given, settings=settings)
        shards = [*(path / "index/pool").rglob("*.safetensors")]
        index = gradsift.open_index(path)
        for way, (method, settings) in WAYS.items():
            asked = folder / f"asked-{dimension}"
            shutil.rmtree(asked, ignore_errors=True)
            started = time.perf_counter()
            own = merge(SETTINGS, settings)
            result = index.select(target=target, output_dir=asked, method=method, settings=own)
            seconds = time.perf_counter() - started
            size = sum(shard.stat().st_size for shard in shards) / result.num_pool
            first = result.selections[TARGETS[0]].picks["id"][0].as_py()
            error = gradsift.explain(asked, first)[0].expected_error
            for name, found in _scores(result).items():
                one = exact[way][name]
                say(
                    f"| {dimension:,} | {size:,.0f} | {error:.4f} | {way} | {name} "
                    f"| {spearmanr(one, found).statistic:.4f} | {_jaccard(one, found):.2f} "
                    f"| {seconds:.1f} |"
                )


def query(folder: Path, num_examples: int, dimension: int) -> None:
    """Print what reading a target's products out of a made-up index takes."""
    engine, rng = EngineConfig(), np.random.default_rng(0)
    stage = Stage("index/pool", {"made up": dimension}, ("index/pool",), keeps_parts=True)
    with locked_run(folder / f"made-up-{num_examples}-{dimension}") as run:
        pool = _Pool(num_examples)
        own = PoolPass(stage.name, pool, run, Local(), engine)  # type: ignore[arg-type]
        with run.stage(stage) as todo:
            if todo:
                own.directory("x").mkdir(parents=True, exist_ok=True)
                for shard in own.missing(own.shards("x")):
                    count = len(shard)
                    ones = np.ones(count, np.float32)
                    numbers = rng.integers(-127, 128, (count, dimension), dtype=np.int8)
                    tensors = {"sketch": numbers, "step": ones, "loss": ones, "gradient_norm": ones}
                    save_shard(shard, tensors)
    _read(folder / f"made-up-{num_examples}-{dimension}", num_examples, dimension)


def _read(folder: Path, num_examples: int, dimension: int) -> None:
    """Read it as a run does that has just been started: hashes are compared too."""
    engine, run = EngineConfig(), Run(folder)
    rows = np.random.default_rng(1).normal(size=(DIRECTIONS, dimension)).astype(np.float32)
    own = PoolPass("index/pool", _Pool(num_examples), run, Local(), engine)  # type: ignore[arg-type]
    before, started = peak_memory(), time.perf_counter()
    index = StoredSketches(own, "x")
    checked = time.perf_counter() - started
    for shard in plan_shards(num_examples, shard_size(engine, num_examples), folder, ""):
        found = index.products(rows, shard.start, shard.stop)["products"]
        assert found.shape == (len(shard), DIRECTIONS)
    seconds = time.perf_counter() - started
    peak = peak_memory()
    say(
        f"{num_examples:,} examples, {dimension:,} numbers: {seconds:.1f} s, {checked:.1f} "
        f"of them for comparing hashes; peak {peak / 2**30:.2f} GiB, {before / 2**30:.2f} before"
    )


class _Pool(EncodedSet):
    """A pool that has a length and nothing else."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def _scores(result: gradsift.RunResult) -> dict[str, np.ndarray]:
    return {name: result.scores()[f"{name}/score"].to_numpy() for name in TARGETS}


def _jaccard(one: np.ndarray, other: np.ndarray, share: float = 0.05) -> float:
    best = [
        {*np.argsort(-scores, kind="stable")[: int(share * len(scores))]} for scores in (one, other)
    ]
    return len(best[0] & best[1]) / len(best[0] | best[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dimension", type=int, action="append")
    parser.add_argument("--rows", type=int, default=13_000)
    parser.add_argument("--query", type=int)
    arguments = parser.parse_args()
    asked = arguments.dimension or [1024, 2048, 4096, 8192, 16384]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.query:
        for own in asked:
            query(arguments.folder, arguments.query, own)
    else:
        quality(arguments.folder, asked, arguments.rows)

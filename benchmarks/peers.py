"""The pool pass beside bergson 2.5.1 and dattri-llm 0.1.0: the same job, in turn, on one machine.

The job: every pool example's LoRA gradient against 64 query gradients, as inner products and norms.
All three get the same model, adapter, token ids, label masks, precision (float32) and threads, and
each its own batches of up to so many tokens; their cosines must rank the pool alike, else it ends
with an error. Seconds are those of the pass alone: no importing, no loading, no queries.
Each peer runs in a virtual environment of its own, made here on top of this one's packages.

What each does that another does not: gradsift returns every loss too and writes nothing here;
bergson writes scores and losses to disk as it goes, as `bergson score` does; dattri-llm writes
scores in the end. None projects. Settings and why: in `peers_bergson.py` and `peers_dattri.py`;
tokens per batch were tried (docs/performance.md).

    python benchmarks/peers.py --folder runs/peers
    python benchmarks/peers.py --shape base --rank 16 --repeats 1
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from peers_inputs import make_base, make_job
from peers_job import Job

HERE = Path(__file__).parent
OURS = "gradsift"
COUNTS = {"base": 1000, "100m": 48, "smollm2": 48}
TOKENS = {"bergson": 1024, "dattri-llm": 1024}  # per batch: the fastest that was tried
TOKENS_BY_SHAPE = {"base": {"dattri-llm": 2048}}
AGREE = 0.999  # the least rank correlation of a query's cosines with ours


@dataclass(frozen=True)
class Peer:
    """Another tool: what to install without what it depends on, and what then must import."""

    packages: tuple[str, ...]
    imports: str
    script: str


PEERS = {
    "bergson": Peer(
        (
            *("bergson==2.5.1", "simple-parsing==0.1.9", "docstring-parser==0.18.0"),
            *("ml_dtypes==0.6.0", "petname==2.9"),
        ),
        "bergson.score.score",
        "peers_bergson.py",
    ),
    "dattri-llm": Peer(("dattri-llm==0.1.0",), "dattri_llm.attribution", "peers_dattri.py"),
}


def make_environment(peer: Peer, folder: Path) -> Path:
    """Return the Python of an environment with the peer, on top of the packages of this one.

    Nothing that is here is downloaded again, torch least of all.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        (Path(own) / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
        install = ["-m", "pip", "install", "--quiet", "--no-deps", *peer.packages]
        subprocess.run([str(python), *install], check=True)
    subprocess.run([str(python), "-c", f"import {peer.imports}"], check=True)
    return python


def run_side(command: Sequence[str | Path], threads: int, log: Path) -> None:
    """Run one side to its end in a process of its own, what it says in a file.

    Raises:
        SystemExit: If it fails, with the end of what it said.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with log.open("w") as file:
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{end}")


def agreement(ours: np.ndarray, theirs: np.ndarray, side: str) -> dict[str, float]:
    """Return how well cosines (pool example × query) agree: the worst query, the worst entry.

    Raises:
        SystemExit: If a query ranks the pool otherwise than ours.
    """
    if ours.shape != theirs.shape:
        raise SystemExit(f"{side} has scores of shape {theirs.shape}, expected {ours.shape}")
    columns = zip(ours.T, theirs.T, strict=True)
    correlation = min(float(spearmanr(own, other)[0]) for own, other in columns)
    if not correlation > AGREE:  # nor NaN
        raise SystemExit(
            f"{side} ranks the pool otherwise: Spearman correlation {correlation:.5f} with ours "
            f"for some query, expected above {AGREE}; are masks and loss the same?"
        )
    return {"spearman": correlation, "difference": float(np.abs(ours - theirs).max())}


def summarise(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], count: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Return each side's median speed, the most memory, and the ratio of its time to ours."""
    seconds = {side: median(run["seconds"] for run in own) for side, own in runs.items()}
    return {
        side: {
            "seconds": seconds[side],
            "examples_per_second": count / seconds[side],
            "tokens_per_second": tokens / seconds[side],
            "memory": max(run["memory"] for run in own),
            "ratio": seconds[side] / seconds[OURS],
        }
        for side, own in runs.items()
    }


def compare(
    job: Job, commands: Mapping[str, Sequence[str | Path]], repeats: int, threads: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, float]]]:
    """Run all sides in turn, as often as asked, and return the figures of each and how they agree.

    Raises:
        SystemExit: If a side fails or its scores rank otherwise.
    """
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    agree: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        for side, command in commands.items():
            run_side(command, threads, job.folder / f"{side}.log")
            cosines, figures = job.read(side)
            runs[side].append(figures)
            if side != OURS:
                agree[side] = agreement(job.read(OURS)[0], cosines, side)
    return runs, agree


def rows_of(
    shape: str,
    rank: int,
    summary: Mapping[str, Mapping[str, float]],
    agree: Mapping[str, Mapping[str, float]],
) -> list[tuple[str, ...]]:
    """Return the lines of the table for one shape and rank."""
    return [
        (
            shape,
            str(rank),
            side,
            f"{figures['examples_per_second']:.3g}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['memory'] / 2**30:.2f}",
            f"{figures['ratio']:.2f}×",
            f"{agree[side]['spearman']:.6f}" if side in agree else "",
        )
        for side, figures in summary.items()
    ]


def main(  # noqa: PLR0913, PLR0917
    shape: Annotated[list[str], typer.Option(help="base, smollm2, or one of pool_pass.py")] = [  # noqa: B006
        *COUNTS
    ],
    rank: Annotated[list[int], typer.Option(help="of the LoRA matrices")] = [16, 128],  # noqa: B006
    count: Annotated[int, typer.Option(help="pool examples; 0: as many as suit the shape")] = 0,
    queries: Annotated[int, typer.Option(help="target examples")] = 64,
    repeats: Annotated[int, typer.Option(help="of all sides in turn")] = 3,
    threads: Annotated[int, typer.Option(help="of every side")] = os.cpu_count() or 1,
    bergson_tokens: Annotated[int, typer.Option(help="per batch of bergson; 0: as tried")] = 0,
    dattri_tokens: Annotated[int, typer.Option(help="per batch of dattri-llm; 0: as tried")] = 0,
    folder: Annotated[Path | None, typer.Option(help="keeps environments and models")] = None,
    results: Annotated[Path | None, typer.Option(help="JSON Lines, appended as found")] = None,
) -> None:
    """Print examples/s, tokens/s, memory, times as long as ours, and the rank correlation."""
    table = Table("shape", "r", "side", "ex/s", "tok/s", "peak GiB", "time, to ours", "Spearman")
    with ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept.mkdir(parents=True, exist_ok=True)
        pythons = {name: make_environment(peer, kept / name) for name, peer in PEERS.items()}
        wanted = {"bergson": bergson_tokens, "dattri-llm": dattri_tokens}
        for name in shape:
            base, number = make_base(name, kept), count or COUNTS.get(name, 64)
            for r in rank:
                with tempfile.TemporaryDirectory(dir=kept) as scratch:
                    job = make_job(base, r, (number, queries), Path(scratch))
                    given = {"shape": name, "rank": r, "threads": threads, "queries": queries}
                    commands = commands_of(job, pythons, tokens_of(name, wanted), threads)
                    runs, agree = compare(job, commands, repeats, threads)
                    num_tokens = sum(len(row["input_ids"]) for row in job.rows("pool"))
                summary = summarise(runs, number, num_tokens)
                write_down(results, given, runs, {
                    side: {**figures, **agree.get(side, {})} for side, figures in summary.items()
                })  # fmt: skip
                for row in rows_of(name, r, summary, agree):
                    table.add_row(*row)
    Console(width=120).print(table)


def tokens_of(shape: str, wanted: Mapping[str, int]) -> dict[str, int]:
    """Return each peer's tokens per batch: those wanted, or the fastest that was tried."""
    tried = TOKENS | TOKENS_BY_SHAPE.get(shape, {})
    return {name: wanted.get(name) or tokens for name, tokens in tried.items()}


def commands_of(
    job: Job, pythons: Mapping[str, Path], tokens: Mapping[str, int], threads: int
) -> dict[str, list[str | Path]]:
    """Return how each side is run; bergson's queries are stored once, before."""
    commands: dict[str, list[str | Path]] = {
        OURS: [sys.executable, HERE / "peers_ours.py", job.folder]
    }
    for name, python in pythons.items():
        commands[name] = [python, HERE / PEERS[name].script, job.folder, str(tokens[name])]
    stored = [*commands["bergson"], "queries"]
    run_side(stored, threads, job.folder / "queries.log")
    return commands


def write_down(
    results: Path | None,
    given: Mapping[str, object],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    summary: Mapping[str, Mapping[str, float]],
) -> None:
    """Append every run, and what is made of them, to a file of JSON Lines."""
    if not results:
        return
    entries = [{"side": side, **run} for side, own in runs.items() for run in own]
    entries += [{"side": side, "summary": True, **figures} for side, figures in summary.items()]
    with results.open("a", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps({"benchmark": "peers", **given, **entry}) + "\n")


if __name__ == "__main__":
    typer.run(main)

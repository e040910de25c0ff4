"""What GIST takes beside LESS, on the same pool and targets: seconds and bytes of every stage.

    python benchmarks/claims.py runs/claims --set lora.rank=16 --set warmup.learning_rate=1e-3

GIST measures at one checkpoint, LESS at four, projected to 8192 dimensions. Both share the encoded
data, which is not counted; each runs in a process of its own, one after the other. Pool, four
targets and model are those beside the project unless arguments say otherwise; all arguments but
the folder are passed on to `gradsift select`. A folder that has both already is only read.

`--made-up 4000` takes so many made-up examples, and a made-up model, in place of those;
`--results FILE` appends what was found as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from made_up import make_shared

SHARED = Path(__file__).parents[2] / "shared"
TARGETS = ("gsm8k", "sql", "emotion", "bbh")
STAGES = {
    "gist": {"warm-up": "warmup", "targets": "targets", "pool": "coordinates"},
    "less": {"warm-up": "less/warmup", "targets": "less/targets", "pool": "less/pool"},
}
PAPER = {"seconds": "25 %", "bytes of the pool": "0.29 %"}


def main(folder: Path, shared: Path, arguments: list[str]) -> dict[str, object]:
    """Run both, print what each took, and return it."""
    for method in STAGES:
        given = ["--model", shared / "models" / "base", "--pool", shared / "data" / "pool.jsonl"]
        for name in TARGETS:
            given += ["--target", f"{name}={shared / 'data' / 'targets' / name / 'val.jsonl'}"]
        command = [sys.executable, "-m", "gradsift", "select", "--method", method]
        command += ["--output-dir", folder, *given, *arguments]
        subprocess.run([str(part) for part in command], check=True)
    seconds = {method: _by_stage(folder, method, _seconds) for method in STAGES}
    sizes = {method: _by_stage(folder, method, _bytes) for method in STAGES}
    num_pool = pq.read_metadata(folder / "scores" / "gist.parquet").num_rows
    table = Table("stage", "GIST s", "LESS s", "ratio", "GIST MB", "LESS MB", "ratio")
    for stage in STAGES["gist"]:
        table.add_row(stage, *_row(seconds, stage), *_row(sizes, stage, 1e-6))
    for found in (seconds, sizes):
        for values in found.values():
            values["in all"] = sum(values.values())
    table.add_row("in all", *_row(seconds, "in all"), *_row(sizes, "in all", 1e-6))
    console = Console(width=120)
    console.print(table)
    per_example = {method: values["pool"] / num_pool for method, values in sizes.items()}
    console.print(
        f"time of GIST over LESS: {seconds['gist']['in all'] / seconds['less']['in all']:.1%} "
        f"(paper: {PAPER['seconds']})\n"
        f"stored of the pool, GIST over LESS: {per_example['gist'] / per_example['less']:.2%} "
        f"(paper: {PAPER['bytes of the pool']}); {per_example['gist']:,.0f} and "
        f"{per_example['less']:,.0f} bytes per example"
    )
    of_target = {name: _bytes(folder, f"coordinates/{name}") / num_pool for name in TARGETS}
    for name, size in of_target.items():  # as the paper counts it
        console.print(
            f"{name} by itself: {size:,.0f} bytes per example, {size / per_example['less']:.2%}"
        )
    found = {"num_pool": num_pool, "seconds": seconds, "bytes": sizes}
    return found | {"bytes_per_example_by_target": of_target}


def _by_stage(folder: Path, method: str, measure: object) -> dict[str, float]:
    assert callable(measure)
    return {stage: measure(folder, name) for stage, name in STAGES[method].items()}


def _seconds(folder: Path, name: str) -> float:
    """Return the seconds of a stage, or of all those below its name, one for each target."""
    path = folder / "manifests" / f"{name}.json"
    paths = [path] if path.exists() else sorted(path.with_suffix("").glob("*.json"))
    manifests = [json.loads(path.read_text()) for path in paths]
    if not manifests or any(m.get("resumed") or not m["complete"] for m in manifests):
        sys.exit(f"{name} was broken off and gone on with; give a new folder")
    return sum(manifest["seconds"] for manifest in manifests)


def _bytes(folder: Path, name: str) -> float:
    return sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())


def _row(found: dict[str, dict[str, float]], stage: str, unit: float = 1.0) -> tuple[str, ...]:
    gist, less = (found[method][stage] for method in STAGES)
    return f"{gist * unit:,.1f}", f"{less * unit:,.1f}", f"{gist / less:.2%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--made-up", type=int, default=0)
    parser.add_argument("--results", type=Path)
    ours, others = parser.parse_known_args()
    shared = SHARED
    if ours.made_up:
        shared = make_shared(ours.folder.with_name("made-up"), ours.made_up, TARGETS)
    found = main(ours.folder, shared, others)
    if ours.results:
        entry = {"benchmark": "claims", "made_up": bool(ours.made_up), **found}
        with ours.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

"""Which method picks best on a real language model: selections, fine-tunings, and what they say.

    python ../shared/models/smollm2.py runs/smollm2
    python benchmarks/evidence.py --output-dir runs/evidence
    python benchmarks/evidence.py --output-dir runs/evidence-13000 --pool-size 13000 --device cuda

All of it stands in `evidence.yaml`. Every part is an evaluation of its own in one run folder, so
parts share what they have in common. Killed, it goes on where it stopped. `results/PART` in the
output folder keeps the tables of each part; `evidence_page.py` makes the page of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import gradsift
from gradsift.runs import layout
from gradsift.sections import merge


def main() -> None:
    """Draw pool and held-out examples, run the parts that are asked for, keep their tables."""
    arguments = _arguments()
    settings = yaml.safe_load(arguments.config.read_text())
    settings |= {k: v for k in ("model", "pool_size") if (v := getattr(arguments, k)) is not None}
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    out, run = arguments.output_dir, arguments.output_dir / "run"
    draw_data(settings, out / "data")
    select(settings, out / "data", run, arguments.device)
    for name in arguments.part or settings["parts"]:
        evaluate(settings, settings["parts"][name], out / "data", run)
        keep_tables(run / layout.EVALUATION, out / "results" / name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    own = Path(__file__).with_suffix(".yaml")
    parser.add_argument("--config", type=Path, default=own, help="default: evidence.yaml")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--model", help="in place of the configuration's")
    parser.add_argument("--pool-size", type=int, help="in place of the configuration's")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …; auto: CUDA if there is one")
    parser.add_argument("--part", action="append", help="repeatable; without it all parts")
    return parser.parse_args()


def draw_data(settings: dict[str, Any], folder: Path) -> None:
    """Write the drawn rows of the pool and of each target's test file, and the targets whole."""
    data, seed = Path(settings["data"]), settings["seed"]
    folder.mkdir(parents=True, exist_ok=True)
    pool = stratified(data / "pool.jsonl", "source", settings["pool_size"], seed)
    (folder / "pool.jsonl").write_bytes(b"".join(pool))
    for target in settings["targets"]:
        own = data / "targets" / target
        shutil.copyfile(own / "val.jsonl", folder / f"{target}.jsonl")
        rows = stratified(own / "test.jsonl", "task", settings["held_out"], seed)
        (folder / f"{target}-test.jsonl").write_bytes(b"".join(rows))


def stratified(path: Path, field: str, count: int, seed: int) -> list[bytes]:
    """Return `count` lines of a JSONL file, in its order, in proportion to the values of a field.

    Shares are rounded down; what is left over goes to the largest remainders.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if count > len(lines):
        raise SystemExit(f"{path} has {len(lines)} rows, asked for were {count}")
    groups: dict[str, list[int]] = defaultdict(list)
    for row, line in enumerate(lines):
        groups[str(json.loads(line).get(field))].append(row)
    names = sorted(groups)
    exact = np.array([count * len(groups[name]) / len(lines) for name in names])
    counts = exact.astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: count - counts.sum()]] += 1
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(groups[n])[:c] for n, c in zip(names, counts, strict=True)]
    return [lines[row] for row in sorted(np.concatenate(drawn))]


def select(settings: dict[str, Any], data: Path, run: Path, device: str) -> None:
    """Make the run that all parts evaluate: gist with its defaults."""
    own = merge(settings["select"], {"model": {"device": device}})
    budget = own.pop("budget")
    gradsift.select(
        model=settings["model"],
        pool=str(data / "pool.jsonl"),
        target={name: str(data / f"{name}.jsonl") for name in settings["targets"]},
        output_dir=run,
        budget=budget,
        settings=own,
    )


def evaluate(settings: dict[str, Any], part: dict[str, Any], data: Path, run: Path) -> None:
    """Run one part."""
    targets = part.get("targets", settings["targets"])
    tests = {name: str(data / f"{name}-test.jsonl") for name in targets}
    gradsift.evaluate(run, tests=tests, **part_settings(settings, part))


def part_settings(settings: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one part's evaluation."""
    own = {key: value for key, value in part.items() if key != "targets"}
    return merge(settings["evaluate"], own)


def keep_tables(evaluation: Path, folder: Path) -> None:
    """Copy what an evaluation found, before the next one writes its own there."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*evaluation.glob("*.parquet"), evaluation / "report.md"):
        shutil.copyfile(source, folder / source.name)


if __name__ == "__main__":
    main()

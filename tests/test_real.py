"""A part of the real pool with real weights, where they lie beside the project."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradsift

SHARED = Path(__file__).parents[2] / "shared"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SHARED.exists(), reason="the real data and weights are not at ../shared"
    ),
]


def first_rows(name: str, count: int, folder: Path) -> str:
    """Write the first rows of a real file into a folder and return the path."""
    path = folder / f"{name.replace('/', '-')}-{count}.jsonl"
    with (SHARED / "data" / f"{name}.jsonl").open("rb") as file:
        path.write_bytes(b"".join(islice(file, count)))
    return str(path)


def select(pool: str, targets: dict[str, str], folder: Path, **settings: Any) -> gradsift.RunResult:
    return gradsift.select(
        model=str(SHARED / "models" / "base"), pool=pool, target=targets, output_dir=folder,
        settings={"lora": {"rank": 8}, "warmup": {"learning_rate": 1e-3}} | settings,
    )  # fmt: skip


def test_a_targets_own_kind_is_over_represented(tmp_path: Path) -> None:
    targets = {t: str(SHARED / "data" / "targets" / t / "val.jsonl") for t in ("gsm8k", "sql")}
    result = select(first_rows("pool", 1000, tmp_path), targets, tmp_path / "run")
    sources = result.scores()["source"].to_pylist()
    for target, kind in (("gsm8k", {"gsm8k_cot", "aqua_cot"}), ("sql", {"sql"})):
        picked = result.selections[target].picks["source"].to_pylist()
        in_picks, in_pool = (sum(s in kind for s in x) / len(x) for x in (picked, sources))
        assert in_picks > 2 * in_pool, (target, in_picks, in_pool)


def test_half_precision_ranks_alike(tmp_path: Path) -> None:
    """Few rows: a CPU without bfloat16 units takes most of a second for each."""
    targets = {t: first_rows(f"targets/{t}/val", 12, tmp_path) for t in ("gsm8k", "sql")}
    pool = first_rows("pool", 80, tmp_path)
    whole = select(pool, targets, tmp_path / "whole")
    half = select(
        pool, targets, tmp_path / "half", model={"dtype": "bfloat16"},
        warmup={"adapter": str(tmp_path / "whole" / "warmup" / "epoch-1")},
    )  # fmt: skip
    for target in targets:
        scores = (run.scores()[f"{target}/score"].to_numpy() for run in (whole, half))
        ranks = [np.argsort(np.argsort(values)) for values in scores]
        assert np.corrcoef(ranks)[0, 1] > 0.995

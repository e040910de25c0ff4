"""A part of the real pool with real weights, where they lie beside the project."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import gradsift

SHARED = Path(__file__).parents[2] / "shared"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real data and weights are not at ../shared")
def test_a_targets_own_kind_is_over_represented_and_in_half_precision_too(tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    with (SHARED / "data" / "pool.jsonl").open("rb") as file:
        pool.write_bytes(b"".join(islice(file, 1000)))
    result = gradsift.select(
        model=str(SHARED / "models" / "base"),
        pool=str(pool),
        target={t: str(SHARED / "data" / "targets" / t / "val.jsonl") for t in ("gsm8k", "sql")},
        output_dir=tmp_path / "run",
        settings={"lora": {"rank": 8}, "warmup": {"learning_rate": 1e-3}},
    )
    sources = result.scores()["source"].to_pylist()
    for target, kind in (("gsm8k", {"gsm8k_cot", "aqua_cot"}), ("sql", {"sql"})):
        picked = result.selections[target].picks["source"].to_pylist()
        in_picks, in_pool = (sum(s in kind for s in x) / len(x) for x in (picked, sources))
        assert in_picks > 2 * in_pool, (target, in_picks, in_pool)
    half = gradsift.select(
        model=str(SHARED / "models" / "base"),
        pool=str(pool),
        target={t: str(SHARED / "data" / "targets" / t / "val.jsonl") for t in ("gsm8k", "sql")},
        output_dir=tmp_path / "half",
        settings={
            "model": {"dtype": "bfloat16"},
            "warmup": {"adapter": str(tmp_path / "run" / "warmup" / "epoch-1")},
        },
    )
    for target in ("gsm8k", "sql"):
        scores = (run.scores()[f"{target}/score"].to_numpy() for run in (result, half))
        ranks = [np.argsort(np.argsort(values)) for values in scores]
        assert np.corrcoef(ranks)[0, 1] > 0.995

"""What `plan` says before, and what `select` took after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gradsift
from conftest import Write

Rows = list[dict[str, Any]]


@pytest.mark.parametrize("rank", ["full", 3])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_plan_says_what_the_run_then_takes(
    base: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path, rank: int | str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pool, target = write("pool.jsonl", pool_rows), write("t.jsonl", target_rows)
    arguments: dict[str, Any] = {
        "model": str(base), "pool": str(pool), "target": {"mine": str(target)},
        "output_dir": tmp_path / "run", "budget": "6",
        "settings": {
            "model": {"device": "cpu"}, "lora": {"rank": 2}, "gist": {"rank": rank},
            "warmup": {"batch_size": 2, "micro_batch_size": 2, "learning_rate": 0.01},
        },
    }  # fmt: skip
    found = gradsift.plan(**arguments)
    assert (found.num_pool, found.batch_tokens, found.device_memory) == (90, 2048, 0)
    assert [*found.seconds] == ["encoding", "warm-up", "subspace of mine", "pool pass", "scores"]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.host_memory > 2**20
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "data", "manifests", "rejected.jsonl", ".lock", ".owner",
    }  # fmt: skip
    caplog.set_level("INFO")
    result = gradsift.select(**arguments)
    assert "data/pool: already done" in caplog.text
    spectrum = json.loads((result.path / "targets" / "mine" / "spectrum.json").read_text())
    assert spectrum["epoch-1"]["rank"] == found.ranks["mine"]
    parts = ("data", "coordinates", "warmup", "scores")
    files = [f for part in parts for f in [result.path / part, *(result.path / part).rglob("*")]]
    disk = sum(file.stat().st_size for file in files if file.is_file())
    assert 0.7 * disk < found.disk < 1.3 * disk


def test_bad_data_stops_a_plan_as_it_stops_a_run(
    base: Path, write: Write, target_rows: Rows, tmp_path: Path
) -> None:
    pool, target = write("pool.jsonl", ["{"]), write("t.jsonl", target_rows)
    with pytest.raises(gradsift.GradsiftError, match="pool has no usable row"):
        gradsift.plan(
            model=str(base), pool=str(pool), target={"t": str(target)}, output_dir=tmp_path / "run"
        )

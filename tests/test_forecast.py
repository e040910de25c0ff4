"""What `plan` says before, and what `select` took after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gradsift
from conftest import Write
from gradsift.pipeline import RunResult

Rows = list[dict[str, Any]]
Arguments = dict[str, Any]
PASSES = {
    "gist": ["warm-up", "subspace of mine", "pool pass", "scores"],
    "cosine": ["warm-up", "gradients of mine", "pool pass", "scores"],
    "less": ["warm-up", "gradients of mine", "pool pass", "scores"],
    "rds": ["forward pass over mine", "pool pass", "scores"],
    "perplexity": ["pool pass", "scores"],
    "influence": ["warm-up", "curvature", "pool pass", "scores"],
    "target-path": ["pool pass", "training on mine", "pool pass for mine", "scores"],
    "fuse": ["warm-up", "subspace of mine", "pool pass", "forward pass over mine", "scores"],
}


@pytest.fixture
def given(
    base: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> Arguments:
    pool, target = write("pool.jsonl", pool_rows), write("t.jsonl", target_rows)
    return {
        "model": str(base), "pool": str(pool), "target": {"mine": str(target)},
        "output_dir": tmp_path / "run", "budget": "6",
        "settings": {
            "model": {"device": "cpu"}, "lora": {"rank": 2},
            "less": {"checkpoints": 2, "dimension": 128},
            "target_path": {"steps": 4},
            "warmup": {"batch_size": 2, "learning_rate": 0.01},
        },
    }  # fmt: skip


def disk_of(result: RunResult) -> int:
    parts = (
        "data",
        "coordinates",
        "warmup",
        "targets",
        "scores",
        "cosine",
        "less",
        "base",
        "influence",
        "target-path",
    )
    files = [file for part in parts for file in (result.path / part).rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.parametrize("rank", ["full", 3])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_plan_says_what_the_run_then_takes(
    given: Arguments, tmp_path: Path, rank: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    given["settings"]["gist"] = {"rank": rank}
    found = gradsift.plan(**given)
    assert (found.num_pool, found.batch_tokens, found.device_memory) == (90, 2048, 0)
    assert [*found.seconds] == ["encoding", *PASSES["gist"]]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.host_memory > 2**20
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "data", "manifests", "rejected.jsonl", ".lock", ".owner",
    }  # fmt: skip
    caplog.set_level("INFO")
    result = gradsift.select(**given)
    assert "data/pool: already done" in caplog.text
    spectrum = json.loads((result.path / "targets" / "mine" / "spectrum.json").read_text())
    assert spectrum["epoch-1"]["rank"] == found.ranks["mine"]
    assert 0.7 * disk_of(result) < found.disk < 1.3 * disk_of(result)


@pytest.mark.parametrize("method", [method for method in PASSES if method != "gist"])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_plan_knows_the_stages_and_files_of_every_method_with_a_model(
    given: Arguments, method: str
) -> None:
    found = gradsift.plan(**given, method=method)
    assert found.method == method
    assert [*found.seconds] == ["encoding", *PASSES[method]]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert (found.ranks, found.batch_tokens) == ({"mine": 7} if method == "fuse" else {}, 2048)
    result = gradsift.select(**given, method=method)
    if method != "target-path":  # its small adapters are not forecast, and this pool is tiny
        assert 0.7 * disk_of(result) < found.disk < 1.3 * disk_of(result)


@pytest.mark.parametrize(("window", "held"), [(1024, 90), (8, 8)])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_whole_gradients_that_wait_for_their_projection_count_as_memory(
    given: Arguments, window: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = 10**12  # bytes, above all that is really taken
    monkeypatch.setattr("gradsift.forecast.peak_memory", lambda: beside)
    given["settings"]["engine"] = {"window": window, "shard_size": window}
    parameters = 2 * 2 * (64 + 48 + 48 + 64)  # of 2 layers at rank 2: q, k, v and o
    assert gradsift.plan(**given, method="less").host_memory - beside == held * 4 * parameters


@pytest.mark.parametrize("method", ["bm25", "length", "random"])
def test_a_method_without_a_model_has_no_forecast_but_the_encoding(
    given: Arguments, method: str
) -> None:
    found = gradsift.plan(**given, method=method)
    assert [*found.seconds] == ["encoding"]
    assert found.batch_tokens == 0


def test_bad_data_stops_a_plan_as_it_stops_a_run(
    base: Path, write: Write, target_rows: Rows, tmp_path: Path
) -> None:
    pool, target = write("pool.jsonl", ["{"]), write("t.jsonl", target_rows)
    with pytest.raises(gradsift.GradsiftError, match="pool has no usable row"):
        gradsift.plan(
            model=str(base), pool=str(pool), target={"t": str(target)}, output_dir=tmp_path / "run"
        )

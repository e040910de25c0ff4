"""What `plan` says before, and what `select` took after."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch

import gradsift
import tiny_models
from conftest import Write
from gradsift.config import EngineConfig, LoraConfig, WarmupConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.errors import NumericsError
from gradsift.methods.job import Job
from gradsift.models.batches import lengths_of
from gradsift.selection.run_result import RunResult
from gradsift.trials import Trials, _try_pool

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


@pytest.mark.parametrize(("window", "held"), [(1024, 90), (8, 8), (1024, 0)])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_whole_gradients_that_wait_for_their_projection_count_as_memory(
    given: Arguments, window: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = 10**12  # bytes, above all that is really taken
    monkeypatch.setattr("gradsift.forecast.peak_memory", lambda: beside)
    if not held:  # as on a GPU, where the kernel projects every batch
        kernel = SimpleNamespace(add_product=lambda rows, first, start, into: into.add_(1))
        monkeypatch.setitem(sys.modules, "gradsift.gradients.sign_kernel", kernel)
        monkeypatch.setattr("gradsift.gradients.random_projection.has_kernel", lambda _: True)
    given["settings"]["engine"] = {"window": window, "shard_size": window}
    parameters = 2 * 2 * (64 + 48 + 48 + 64)  # of 2 layers at rank 2: q, k, v and o
    assert gradsift.plan(**given, method="less").host_memory - beside == held * 4 * parameters


class FewExamples(EncodedSet):
    """A pool in memory."""

    def __init__(self, given: list[Encoded]) -> None:
        self._given = given

    def __len__(self) -> int:
        return len(self._given)

    def examples(self, rows: Sequence[int] | np.ndarray) -> list[Encoded]:
        return [self._given[row] for row in rows]

    def table(self, columns: Sequence[str]) -> pa.Table:
        return pa.table({"num_tokens": [len(example.input_ids) for example in self._given]})


@pytest.mark.parametrize(("num_pool", "skipped"), [(1, 0), (3, 2), (3, 3), (400, 0)])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_the_speed_of_a_training_is_found_on_any_pool_without_its_search_for_what_fits(
    num_pool: int, skipped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, set_up, calls, searched = [0.0], [9.0, 2.0, 2.3], [], [0]

    def train(model: object, examples: list[Encoded], settings: object, **_: object) -> None:
        num_tokens = sum(len(example.input_ids) for example in examples)
        clock[0] += set_up[len(calls)] + 0.01 * num_tokens
        calls.append(num_tokens)
        longest = int(lengths_of(examples).max())
        if longest > max(searched):
            clock[0] += 100
            searched.append(longest)
        if len(calls) <= skipped:  # as in float16, when a first step is too large
            raise NumericsError("every step was skipped")

    monkeypatch.setattr("gradsift.models.training.train", train)
    monkeypatch.setattr("gradsift.trials.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    config = SimpleNamespace(warmup=WarmupConfig(), lora=LoraConfig())
    models = SimpleNamespace(with_fresh_adapter=lambda *_: nullcontext(model))
    pool, model = FewExamples(tiny_models.examples(num_pool)), tiny_models.adapted("llama")
    trials = Trials(Mock(Job, config=config, pool=pool, models=models, targets={}), tmp_path)
    if skipped == len(set_up):
        with pytest.raises(NumericsError, match="every step was skipped"):
            _ = trials._training
        return
    first, per_token = trials._training
    assert first == pytest.approx(2.0 + 0.01 * calls[0])
    assert len(searched) == 2
    assert per_token == pytest.approx(0.01, rel=0.1)


def test_a_plan_halves_batches_that_do_not_fit_as_a_run_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks, pool = [0], FewExamples(tiny_models.examples(64))
    monkeypatch.setattr("gradsift.models.batches.device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr("gradsift.models.batch_size.clear_device_cache", lambda **_: None)
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.append(0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[-1])

    def run(examples: Sequence[Encoded], max_tokens: int) -> None:
        peaks[-1] = max(peaks[-1], max_tokens)
        if max_tokens > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    speed = _try_pool(pool, EngineConfig(batch_tokens=1000), run, tiny_models.build("llama"))
    assert (speed.batch_tokens, speed.device_memory) == (250, 250)


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

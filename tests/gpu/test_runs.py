"""On CUDA: `select`, `evaluate` and `geometry` whole, on tiny models and the demonstration's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import Trainer

import gradsift
from conftest import Write, configure
from gradsift.demo.base_model import cached_base
from gradsift.demo.skills import SKILLS, make_examples
from gradsift.models.batches import device_of
from gradsift.pipeline import run
from gradsift.sections import merge
from gradsift.selection.run_result import RunResult

pytestmark = pytest.mark.gpu

Rows = list[dict[str, Any]]
TRAINING = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2}
METHODS = ["gist", "less", "cosine", "influence", "rds", "perplexity"]


@pytest.fixture
def files(write: Write, pool_rows: Rows, target_rows: Rows) -> dict[str, Path]:
    return {"pool": write("pool.jsonl", pool_rows), "t": write("t.jsonl", target_rows)}


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Where the model of each training was when it was over."""
    found: list[torch.device] = []
    plain = Trainer.train

    def watched(self: Trainer, *given: Any, **named: Any) -> object:
        result = plain(self, *given, **named)
        assert self.model is not None
        found.append(device_of(self.model))
        return result

    monkeypatch.setattr(Trainer, "train", watched)
    return found


def place(device: torch.device, dtype: str = "auto") -> dict[str, str]:
    return {"device": str(device), "dtype": dtype}


def scores(result: RunResult, name: str = "t") -> np.ndarray:
    return result.scores()[f"{name}/score"].to_numpy()


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_select_evaluate_and_geometry_stay_on_the_device_asked_for(
    base: Path,
    files: dict[str, Path],
    write: Write,
    tmp_path: Path,
    device: torch.device,
    trained_on: list[torch.device],
    dtype: str,
) -> None:
    dtype = "bfloat16" if device.type == "cpu" and dtype == "float16" else dtype  # hours there
    # the gradients of this model are large: in float16 the first six steps or so are skipped
    in_float16 = dtype == "float16"
    warmup, steps = ({"epochs": 4}, {"steps": 16}) if in_float16 else ({}, {})
    config = configure(
        base, files["pool"], {"t": files["t"]}, model=place(device, dtype), warmup=warmup
    )
    result = run(config, tmp_path / "run")
    assert np.isfinite(scores(result)).all()
    assert trained_on == [device]
    tests = {"t": str(write("test.jsonl", make_examples("sql", 6, seed=3)))}
    found = gradsift.evaluate(
        tmp_path / "run", tests=tests, methods=["gist", "length"], seeds=2, random_seeds=3,
        fine_tuning=TRAINING | steps,
    )  # fmt: skip
    assert [row.method for row in found.rows] == ["base", "random", "gist", "length"]
    assert len(trained_on) == 1 + 3 + 2 + 2
    assert set(trained_on) == {device}
    by_method = {row.method: row for row in found.rows}
    if not in_float16:
        assert by_method["random"].loss < by_method["base"].loss
    measured = gradsift.measure_geometry(tmp_path / "run", examples=4, eigenvectors=2, probes=3)
    eigenvalues = measured["t"]["places"]["epoch-1"]["hessian"]["eigenvalues"]
    assert np.isfinite(eigenvalues).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ranks_as_on_a_cpu(
    method: str,
    base: Path,
    files: dict[str, Path],
    tmp_path: Path,
    device: torch.device,
    figure: Callable[..., None],
) -> None:
    given = (base, files["pool"], {"t": files["t"]})
    own = {"method": method, "less": {"checkpoints": 1, "dimension": 256}}
    on_cpu = configure(*given, warmup={"keep_optimizer": True}, **own)
    first = run(on_cpu, tmp_path / "cpu")
    # the same adapter, and the moments that LESS needs beside it: trainings differ by rounding
    [adapter] = {path.parent for path in (tmp_path / "cpu").rglob("adapter_model.safetensors")} or [
        None
    ]
    warmup = {} if adapter is None else {"adapter": str(adapter)}
    there = configure(*given, model=place(device, "float32"), warmup=warmup, **own)
    second = run(there, tmp_path / "there")
    correlation = float(spearmanr(scores(first), scores(second)).statistic)
    figure(spearman=correlation)
    assert correlation >= 0.999


def test_bfloat16_ranks_a_trained_models_examples_as_float32_does(
    write: Write,
    tmp_path: Path,
    device: torch.device,
    figure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    base = cached_base(100)  # trained here, in seconds, on a hundred examples of each skill
    made = [example for skill in SKILLS for example in make_examples(skill, 60, seed=1)]
    pool, target = write("p.jsonl", made), write("t.jsonl", make_examples("sql", 32, seed=2))
    usual = {"lora": {"rank": 16, "alpha": 32}, "engine": {"batch_tokens": "auto", "window": 1024}}
    usual["engine"]["shard_size"] = 1024
    first = configure(base, pool, {"t": target}, **merge(usual, {"model": place(device)}))
    found = {}
    adapter: Path | None = None
    for dtype in ("float32", "bfloat16"):
        warmup = {} if adapter is None else {"adapter": str(adapter)}
        config = type(first).build(
            merge(first.model_dump(), {"model": place(device, dtype), "warmup": warmup})
        )
        found[dtype] = scores(run(config, tmp_path / dtype))
        adapter = tmp_path / "float32" / "warmup" / "epoch-1"
    correlation = float(spearmanr(*found.values()).statistic)
    best = [set(np.argsort(-values, kind="stable")[:30]) for values in found.values()]
    figure(spearman=correlation, of_the_best_30=len(best[0] & best[1]))
    assert correlation >= 0.995

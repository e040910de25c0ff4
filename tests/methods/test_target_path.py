"""target-path against the plain way: PEFT's own loading, one example at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import reference
from conftest import Write, configure
from gradsift.config import Config
from gradsift.data.encoded import EncodedSet
from gradsift.demo.skills import make_examples
from gradsift.methods.target_path import normalised_drop
from gradsift.pipeline import run
from gradsift.selection.run_result import RunResult

Rows = list[dict[str, Any]]
TRAINING = {"rank": 2, "steps": 30, "learning_rate": 1e-2, "batch_size": 2}


@pytest.fixture
def config(base: Path, write: Write, pool_rows: Rows, target_rows: Rows) -> Config:
    targets = {
        "t": write("t.jsonl", target_rows),
        "u": write("u.jsonl", make_examples("sorting", 6, seed=4)),
    }
    pool = write("pool.jsonl", pool_rows[:45])
    return configure(base, pool, targets, method="target-path", target_path=TRAINING)


def changed(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"target_path": config.target_path.model_copy(update=changes)})


def scores(result: RunResult, target: str = "t") -> np.ndarray:
    return result.scores()[f"{target}/score"].to_numpy()


def test_scores_are_those_of_the_plain_way(base: Path, config: Config, tmp_path: Path) -> None:
    result = run(config, tmp_path / "run")
    pool = EncodedSet(tmp_path / "run/data/pool.parquet")
    examples = pool.examples(range(len(pool)))

    def losses(model: Any) -> np.ndarray:
        with torch.no_grad():
            return np.array([reference.loss(model.eval(), e).item() for e in examples])

    before = losses(AutoModelForCausalLM.from_pretrained(str(base)))
    for target in ("t", "u"):
        adapter = tmp_path / f"run/target-path/{target}/warmup"
        model = AutoModelForCausalLM.from_pretrained(str(base))
        after = losses(PeftModel.from_pretrained(model, str(adapter)))
        found, expected = scores(result, target), (before - after) / before
        assert np.abs(found - expected).max() < 1e-5
        assert expected.std() > 1e-3  # else any order would pass
        best = np.argsort(-found, kind="stable")[:4].tolist()
        assert result.selections[target].picks["row"].to_pylist() == best
    np.testing.assert_allclose(result.scores()["loss"].to_numpy(), before, rtol=1e-4)


def test_each_target_favours_examples_of_its_own_kind(config: Config, tmp_path: Path) -> None:
    result = run(config, tmp_path / "run")
    sources = np.arange(45) % 3  # sorting, sql, record, in turn
    ahead = scores(result, "u") - scores(result, "t")  # u is of sorting, t of the others
    assert ahead[sources == 0].mean() > ahead[sources != 0].mean() + 0.005


def test_the_adapter_is_small_at_the_scale_of_the_run(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "run")
    folder = tmp_path / "run/target-path/t/warmup"
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["r"] == 2
    assert adapter["lora_alpha"] / 2 == config.lora.alpha / config.lora.rank
    log = json.loads((folder / "log.json").read_text())
    assert [entry["step"] for entry in log] == [*range(1, 31)]
    assert np.mean([e["loss"] for e in log[-5:]]) < np.mean([e["loss"] for e in log[:5]])


@pytest.mark.slow
def test_a_training_that_moves_nothing_is_told(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = "raise target_path.learning_rate or target_path.steps"
    run(config, tmp_path / "a")
    assert told not in caplog.text
    run(changed(config, learning_rate=1e-6), tmp_path / "b")
    assert "t: training on it changed the loss of its own examples by -0.0 % only" in caplog.text
    assert caplog.text.count(told) == 2  # for both targets


@pytest.mark.slow
def test_it_is_trained_on_the_target_alone(
    config: Config, tmp_path: Path, write: Write, pool_rows: Rows
) -> None:
    """Another pool, warm-up part or adapter of the run changes no bit of it; its own seed does."""
    run(config, tmp_path / "a")
    data = config.data.model_copy(update={"pool": (str(write("p.jsonl", pool_rows[45:])),)})
    warmup = config.warmup.model_copy(update={"mode": "none", "seed": 5, "fraction": 0.5})
    run(config.model_copy(update={"data": data, "warmup": warmup}), tmp_path / "b")
    run(changed(config, seed=1), tmp_path / "c")
    name = "target-path/t/warmup/adapter_model.safetensors"
    one, same, other = ((tmp_path / run / name).read_bytes() for run in "abc")
    assert one == same
    assert one != other


@pytest.mark.slow
def test_how_the_pool_is_cut_changes_no_score(config: Config, tmp_path: Path) -> None:
    one = scores(run(config, tmp_path / "a"))
    engine = config.engine.model_copy(update={"window": 7, "shard_size": 7, "batch_tokens": 90})
    other = scores(run(config.model_copy(update={"engine": engine}), tmp_path / "b"))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_losses_alone_are_stored_and_what_is_there_is_used(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config.model_copy(update={"method": "rds"}), folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("base/pool/*.safetensors")}
    whole = run(config, folder)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    shards = sorted((folder / "target-path/t/pool").glob("*.safetensors"))
    assert len(shards) == 2
    for shard, size in zip(shards, (32, 13), strict=True):
        [(name, losses)] = load_file(shard).items()
        assert (name, losses.dtype, losses.shape) == ("loss", np.float32, (size,))
    content = shards[1].read_bytes()
    shards[1].unlink()
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("target-path/*/*/*.safetensors")}
    again = run(config, folder)
    assert shards[1].read_bytes() == content
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    np.testing.assert_array_equal(scores(whole), scores(again))


def test_a_loss_of_nothing_has_no_share_to_lose() -> None:
    before = np.array([2, 2, 0, 1e-8, 1e-4, 0], np.float32)
    after = np.array([1, 3, 0, 0, 0, 0.5], np.float32)
    found = normalised_drop(before, after)
    np.testing.assert_allclose(found, [0.5, -0.5, 0, 1e-5, 0.1, -500], rtol=1e-5)
    assert found.dtype == np.float32

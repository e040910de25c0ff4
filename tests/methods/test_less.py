"""LESS against the plain way: whole rows, a projection that is held, one checkpoint at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import reference
import tiny_models
from conftest import Write, configure
from gradsift.config import Config, ModelConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import ConfigError, ModelError
from gradsift.gradients import random_projection
from gradsift.gradients.per_example import gradient_rows
from gradsift.gradients.random_projection import Projection, project_at_random
from gradsift.methods.less import load_moments
from gradsift.models.adapters import load_adapter
from gradsift.models.loading import load_base
from gradsift.pipeline import run

Rows = list[dict[str, Any]]
CPU = torch.device("cpu")
LESS = {"checkpoints": 2, "dimension": 512, "seed": 3}


@pytest.fixture
def config(base: Path, write: Write, pool_rows: Rows, target_rows: Rows) -> Config:
    files = {"pool": write("pool.jsonl", pool_rows[:40]), "t": write("t.jsonl", target_rows)}
    return configure(base, files["pool"], {"t": files["t"]}, method="less", less=LESS)


def test_scores_are_those_of_the_plain_way(base: Path, config: Config, tmp_path: Path) -> None:
    result = run(config, tmp_path / "run")
    weights = json.loads((tmp_path / "run/less/warmup/checkpoints.json").read_text())
    assert [*weights] == ["epoch-1", "epoch-2"]
    encoded = {n: EncodedSet(tmp_path / f"run/data/{n}.parquet") for n in ("pool", "target.t")}
    examples = {name: found.examples(range(len(found))) for name, found in encoded.items()}
    total = torch.zeros(40, 7, dtype=torch.float64)
    for label, weight in weights.items():
        folder = tmp_path / "run/less/warmup" / label
        model = load_adapter(load_base(ModelConfig(name=str(base), device="cpu")), folder).double()
        rows = {name: reference.gradient_rows(model, own) for name, own in examples.items()}
        state = load_file(folder / "optimizer.safetensors")
        names = [name.replace(".default", "") for name in reference.lora_parameters(model)]
        mean, square = (
            torch.cat([state[f"{name}.{moment}"].flatten() for name in names]).double()
            for moment in ("exp_avg", "exp_avg_sq")
        )
        pool = reference.adam_direction(rows["pool"], mean, square)
        signs = torch.from_numpy(reference.splitmix_signs(pool.shape[1], 512, seed=3))
        cosines = F.normalize(pool @ signs) @ F.normalize(rows["target.t"] @ signs).T
        total += weight / sum(weights.values()) * cosines
    by_task = torch.stack([total[:, :5].mean(1), total[:, 5:].mean(1)], dim=1)
    expected = by_task.max(dim=1).values.numpy()
    found = result.scores()["t/score"].to_numpy()
    assert np.abs(found - expected).max() < 5e-4 * np.abs(expected).max()
    assert expected.std() > 20 * np.abs(found - expected).max()  # else any order would pass
    best = np.argsort(-found, kind="stable")[:4].tolist()
    assert result.selections["t"].picks["row"].to_pylist() == best


def test_how_the_pool_is_cut_changes_no_score(config: Config, tmp_path: Path) -> None:
    one = run(config, tmp_path / "a").scores()["t/score"].to_numpy()
    engine = config.engine.model_copy(update={"window": 7, "shard_size": 7, "batch_tokens": 90})
    other = run(config.model_copy(update={"engine": engine}), tmp_path / "b").scores()
    np.testing.assert_allclose(one, other["t/score"].to_numpy(), atol=2e-4)


def test_another_target_needs_no_other_pass_over_the_pool(
    config: Config, tmp_path: Path, write: Write, target_rows: Rows
) -> None:
    run(config, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/less/pool").rglob("*.safetensors")}
    assert len(before) == 4
    other = write("other.jsonl", target_rows[:3])
    data = config.data.model_copy(update={"targets": {"u": (str(other),)}})
    result = run(config.model_copy(update={"data": data}), tmp_path / "run")
    assert [*result.selections] == ["u"]
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_projection_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 60, 3000, generator=generator)
    y = 0.5 * x + y  # some that are alike
    for dimension in (512, 4096):
        projection = Projection(dimension, seed=1, device=CPU)
        projected = torch.zeros(2, 60, dimension)
        for rows, into in zip((x, y), projected, strict=True):
            projection.add(rows[:, :1300], 0, into)
            projection.add(rows[:, 1300:], 1300, into)
        error = projected[0] @ projected[1].T - x @ y.T
        lengths = x.norm(dim=1)[:, None] * y.norm(dim=1)
        expected = ((lengths**2 + (x @ y.T) ** 2) / dimension).sqrt()
        standardised = error / expected
        assert abs(float(standardised.mean())) < 0.1
        assert 0.9 < float(standardised.std()) < 1.1
        assert float(standardised.abs().max()) < 5.5


def test_signs_depend_on_seed_and_place_alone() -> None:
    projection = Projection(128, seed=5, device=CPU)
    signs = projection.signs(0, 300)
    assert torch.equal(signs[100:170], projection.signs(100, 170))
    assert torch.equal(signs.double(), torch.from_numpy(reference.splitmix_signs(300, 128, 5)))
    assert signs.unique().tolist() == [-1, 1]
    other = Projection(128, seed=6, device=CPU).signs(0, 300)
    assert abs(float((signs * other).mean())) < 4 / (300 * 128) ** 0.5
    assert abs(float(signs.mean())) < 4 / (300 * 128) ** 0.5


def test_projecting_each_batch_finds_the_same_as_holding_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, examples = tiny_models.adapted("llama", targets="all-linear"), tiny_models.examples(9)
    mlp = model.get_base_model().model.layers[0].mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        mlp.up_proj(x)  # not used: a gradient of zero, of which something is made all the same
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))

    monkeypatch.setattr(mlp, "forward", forward)
    held, by_batch = (Projection(64, seed=2, device=CPU) for _ in range(2))
    by_batch.add, by_batch.in_kernel = held.add, True  # as on a GPU
    found = []

    def direction(block: str, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (2 if block.endswith(".A") else 3) + 0.1

    for projection in (held, by_batch):
        for max_tokens in (60, 1000):
            found.append(project_at_random(model, examples, max_tokens, projection, direction))
    rows = gradient_rows(model, examples, 60)
    scaled = torch.cat([direction(block, own) for block, own in rows.items()], dim=1)
    expected = scaled @ held.signs(0, scaled.shape[1]) / 8
    for each in found:
        torch.testing.assert_close(
            each, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.parametrize(
    ("capability", "there", "found", "said"),
    [
        ((9, 0), ("triton", "gcc", "Python.h"), True, ""),
        ((7, 5), ("triton", "gcc", "Python.h"), False, ""),
        ((9, 0), ("gcc", "Python.h"), False, "Triton is missing: random projections take"),
        ((9, 0), ("triton", "Python.h"), False, "a C compiler, which Triton calls, is missing"),
        ((9, 0), ("triton", "gcc"), False, "Python.h, which Triton compiles with, is missing"),
        ((9, 0), ("triton", "gcc", "Python.h", "CC=icc"), False, "a C compiler, which Triton"),
        ((9, 0), ("triton", "icc", "Python.h", "CC=icc"), True, ""),
    ],
)
def test_where_the_kernel_cannot_run_the_log_says_what_is_missing(
    capability: tuple[int, int],
    there: tuple[str, ...],
    found: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    def find(name: str) -> str | None:
        return name if name in there else None

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(random_projection, "find_spec", find)
    monkeypatch.setattr(random_projection.shutil, "which", find)
    monkeypatch.delenv("CC", raising=False)
    if "CC=icc" in there:
        monkeypatch.setenv("CC", "icc")
    if "Python.h" in there:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(random_projection, "_header", lambda: tmp_path / "Python.h")
    assert random_projection.has_kernel.__wrapped__(torch.device("cuda")) is found
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)


def test_an_adapter_needs_the_state_of_its_optimizer(
    config: Config, adapter: Path, tmp_path: Path
) -> None:
    warmup = config.warmup.model_copy(update={"adapter": str(adapter)})
    with pytest.raises(ModelError, match=r"has no optimizer.safetensors: LESS needs the moments"):
        run(config.model_copy(update={"warmup": warmup}), tmp_path / "run")


def test_an_adapter_with_its_optimizer_is_taken_as_the_only_checkpoint(
    config: Config, tmp_path: Path
) -> None:
    run(config, tmp_path / "run")
    warmup = config.warmup.model_copy(update={"adapter": str(tmp_path / "run/less/warmup/epoch-2")})
    less = config.less.model_copy(update={"checkpoints": 1})
    again = run(config.model_copy(update={"warmup": warmup, "less": less}), tmp_path / "again")
    assert (tmp_path / "again/warmup/adapter/optimizer.safetensors").exists()
    last = sorted((tmp_path / "run/less/pool/epoch-2").glob("*"))
    kept = sorted((tmp_path / "again/less/pool/adapter").glob("*"))
    assert len(last) == len(kept) == 2
    for one, other in zip(last, kept, strict=True):
        assert (load_file(one)["gradient"] == load_file(other)["gradient"]).all()
    assert again.num_pool == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, name: state.pop(f"{name}.exp_avg"), "exp_avg of {} is missing there"),
        (
            lambda state, name: state.update({f"{name}.exp_avg_sq": torch.ones(2, 2)}),
            r"exp_avg_sq of {} is \[2, 2\] there, expected \[4, 32\]",
        ),
        (
            lambda state, name: state.update({"another.weight.exp_avg": torch.ones(2)}),
            "it has another.weight.exp_avg, which the adapter lacks",
        ),
    ],
    ids=["missing", "of another shape", "superfluous"],
)
def test_a_state_that_does_not_fit_names_the_parameter(
    base: Path, adapter: Path, tmp_path: Path, change: Any, message: str
) -> None:
    model = load_adapter(load_base(ModelConfig(name=str(base), device="cpu")), adapter)
    state = {
        f"{name.replace('.default', '')}.{moment}": torch.ones_like(value).contiguous()
        for name, value in reference.lora_parameters(model).items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    save_file(state, tmp_path / "optimizer.safetensors")
    assert len(load_moments(model, tmp_path)) == 8
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    change(state, name)
    save_file(state, tmp_path / "optimizer.safetensors")
    with pytest.raises(ModelError, match=message.format(name.replace(".", r"\."))):
        load_moments(model, tmp_path)


def test_without_a_warm_up_there_are_no_moments(config: Config, tmp_path: Path) -> None:
    warmup = config.warmup.model_copy(update={"mode": "none"})
    with pytest.raises(ConfigError, match=r"method=less needs a warm-up"):
        run(config.model_copy(update={"warmup": warmup}), tmp_path / "run")


def test_a_warm_up_that_is_less_own_already_is_shared(config: Config, tmp_path: Path) -> None:
    own = {"epochs": 2, "checkpoints": 2, "keep_optimizer": True}
    warmup = config.warmup.model_copy(update=own)
    run(config.model_copy(update={"warmup": warmup}), tmp_path / "run")
    assert (tmp_path / "run/warmup/epoch-2").exists()
    assert not (tmp_path / "run/less/warmup").exists()

"""Influence under the whole Fisher matrix: against that matrix, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reference
from conftest import Write, configure
from gradsift.config import Config, ModelConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import NumericsError, RunError
from gradsift.gradients.curvature import measure_curvature
from gradsift.models.adapters import load_adapter
from gradsift.models.checkpoints import read_checkpoints
from gradsift.models.loading import load_base
from gradsift.pipeline import run
from gradsift.sections import merge
from gradsift.selection.run_result import RunResult
from gradsift.selection.stages import RunStages

Rows = list[dict[str, Any]]
Part = tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of a checkpoint: weight, norms of the pool gradients, F⁻¹q, and their products."""
AGGREGATIONS = ("mean-cosine", "max", "task-mean")


@pytest.fixture
def config(base: Path, write: Write, pool_rows: Rows, target_rows: Rows) -> Config:
    """Two targets, of which one repeats an example and one has a pool example."""
    repeated = [*target_rows, target_rows[0]]
    targets = {"t": write("t.jsonl", repeated), "u": write("u.jsonl", pool_rows[3:6])}
    return configure(
        base, write("pool.jsonl", pool_rows[:45]), targets, method="influence",
        influence={"samples": 12},
    )  # fmt: skip


def change(config: Config, **sections: dict[str, Any]) -> Config:
    return Config.build(merge(config.model_dump(), sections))


def scores(result: RunResult, target: str = "t") -> np.ndarray:
    return result.scores()[f"{target}/score"].to_numpy()


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_the_seed_draws_the_sample_and_a_small_pool_is_all_of_it(
    config: Config, tmp_path: Path
) -> None:
    drawn = [
        scores(run(change(config, influence=changes), tmp_path / str(number)))
        for number, changes in enumerate(
            [{}, {"seed": 1}, {"samples": 45}, {"samples": 1000, "seed": 1}]
        )
    ]
    assert not np.allclose(drawn[0], drawn[1], atol=1e-3)
    np.testing.assert_array_equal(drawn[2], drawn[3])


@pytest.mark.parametrize(
    ("samples", "damping"), [(12, 0.1), pytest.param(1000, 1.0, marks=pytest.mark.slow)]
)
def test_scores_are_those_of_the_whole_matrix(
    samples: int, damping: float, config: Config, tmp_path: Path
) -> None:
    config = change(
        config,
        warmup={"epochs": 2, "checkpoints": 2},
        influence={"samples": samples, "damping": damping},
    )
    folder = tmp_path / "run"
    run(config, folder)
    kept = stamps(folder)
    base = load_base(ModelConfig(name=config.model.name, device="cpu"))
    rng = np.random.default_rng(0)
    sample = rng.choice(45, size=min(samples, 45), replace=False)
    sets = {
        name: EncodedSet(folder / f"data/{name}.parquet")
        for name in ("pool", "target.t", "target.u")
    }
    parts: list[Part] = []
    for checkpoint in read_checkpoints(folder / "warmup"):
        model = load_adapter(base, checkpoint.path).double()
        pool, *targets = (
            reference.gradient_rows(model, encoded.examples(range(len(encoded))))
            for encoded in sets.values()
        )
        found = reference.influence(torch.cat(targets), pool, sample, damping)
        parts.append((checkpoint.weight, pool.norm(dim=1, keepdim=True), *found))
        base = model.unload().float()
    assert len(parts) == 2
    counts = [len(sets[f"target.{name}"]) for name in ("t", "u")]
    for aggregation, normalize in product(AGGREGATIONS, (True, False)):
        changes = {"aggregation": aggregation, "normalize": normalize}
        result = run(change(config, influence=changes), folder)
        for name, own in (("t", slice(counts[0])), ("u", slice(counts[0], sum(counts)))):
            tasks = np.array(sets[f"target.{name}"].column("task").to_pylist(), dtype=str)
            expected = _aggregate(parts, own, tasks, aggregation, normalize)
            error = np.abs(scores(result, name) - expected).max()
            assert error <= 5e-4 * np.abs(expected).max(), (changes, name, error)  # kept in float16
    assert stamps(folder) == kept  # nothing was measured again


def _aggregate(
    parts: list[Part], own: slice, tasks: np.ndarray, aggregation: str, normalize: bool
) -> np.ndarray:
    """Return the scores of a target from the reference's directions and products."""
    if aggregation == "max":  # of each example, summed over the checkpoints first
        tasks = np.arange(len(tasks)).astype(str)
    columns = []
    for task in np.unique(tasks):
        column = torch.zeros(45)
        for weight, norms, directions, products in parts:
            some = torch.from_numpy(tasks == task)
            q, p = directions[own][some], products[:, own][:, some]
            if aggregation == "task-mean":
                cosines = p.mean(1) / q.mean(0).norm()
            else:
                cosines = (p / q.norm(dim=1)).mean(1)
            column = column + weight * (cosines / norms[:, 0] if normalize else cosines)
        columns.append(column)
    return torch.stack(columns).max(0).values.numpy()


def test_with_much_damping_it_is_cosine(config: Config, tmp_path: Path) -> None:
    config = change(config, gist={"aggregation": "mean-cosine"}, influence={"damping": 1e7})
    one = run(config, tmp_path / "run")
    other = run(config.model_copy(update={"method": "cosine"}), tmp_path / "run")
    np.testing.assert_allclose(scores(one), scores(other), atol=1e-5)


def test_another_damping_keeps_the_gram_matrix(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = scores(run(config, folder))
    kept = stamps(folder / "influence/curvature")
    assert kept
    other = change(config, influence={"damping": 1.0})
    with pytest.raises(RunError, match=r"'influence/pool/t' made with other settings .*damping"):
        run(other, folder)
    second = scores(run(other, folder, overwrite=True))
    assert stamps(folder / "influence/curvature") == kept
    assert not np.allclose(first, second, atol=1e-3)
    alone = scores(run(other, tmp_path / "alone"))
    np.testing.assert_array_equal(second, alone)


def test_a_variant_beside_the_run_shares_what_does_not_differ(config: Config) -> None:
    def names(**changes: Any) -> list[str]:
        plain = RunStages.of(config)
        inputs = replace(plain.inputs, config=change(config, influence=changes))
        return [stage.name for stage in plain.beside(inputs, "other").measured]

    curvatures, products = (
        [f"influence/{kind}/{name}" for name in "tu"] for kind in ("curvature", "pool")
    )
    assert names(aggregation="max", normalize=False) == ["warmup", *curvatures, *products]
    assert names(damping=1.0)[:3] == ["warmup", *curvatures]
    beside = [name.startswith("other/") for name in names(damping=1.0)]
    assert beside == [False, False, False, True, True]
    beside = [name.startswith("other/") for name in names(samples=9)]
    assert beside == [False, True, True, True, True]


def test_shards_and_interruptions_change_no_bit(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = scores(run(config, folder))
    kept = {path: path.read_bytes() for path in (folder / "influence").rglob("*.safetensors")}
    [lost, *_] = sorted((folder / "influence/pool").rglob("*.safetensors"))
    lost.unlink()
    np.testing.assert_array_equal(scores(run(config, folder)), first)
    assert {path: path.read_bytes() for path in kept} == kept
    small = change(config, engine={"shard_size": 8})
    np.testing.assert_array_equal(scores(run(small, tmp_path / "small")), first)


def _spoil(monkeypatch: pytest.MonkeyPatch, value: float, *places: int) -> None:
    """Let the gradients of some of the different examples of targets and sample be spoilt."""
    from gradsift.gradients import gram

    def spoilt(*args: Any) -> np.ndarray:
        found = sound(*args)
        found[list(places)] = value
        found[:, list(places)] = value
        return found

    sound = gram.fitting_gram
    monkeypatch.setattr(gram, "fitting_gram", spoilt)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (8, r"gradient of the target 'u' is not finite for 1 examples, .*u.jsonl:2"),
        (10, r"gradient of the pool is not finite for 1 examples, .*pool.jsonl:\d"),
    ],
)
def test_an_example_whose_gradient_is_not_finite_is_named(
    place: int, message: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, np.nan, place)
    with pytest.raises(NumericsError, match=message):
        run(config, tmp_path / "run")


def test_a_target_or_sample_without_gradients_is_an_error(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, 0.0, 7, 8, 9)
    with pytest.raises(NumericsError, match=r"every gradient of the target 'u' is zero"):
        run(config, tmp_path / "run")
    with pytest.raises(NumericsError, match=r"every gradient of the 2 pool examples drawn is zero"):
        measure_curvature(np.diag([1.0, 0.0, 0.0]), 2, "float32")


def test_a_target_example_without_a_gradient_takes_no_part(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, 0.0, 8)
    result = run(config, tmp_path / "run")
    assert np.isfinite(scores(result, "u")).all()
    winners = result.scores()["u/best"].to_pylist()
    names = EncodedSet(tmp_path / "run/data/target.u.parquet").column("id").to_pylist()
    assert set(winners) <= {names[0], names[2]}


def test_directions_follow_from_the_gram_matrix() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(7, 20))
    rows[1] = 0
    rows[6] = rows[5]  # equal examples of the sample
    curvature = measure_curvature(rows @ rows.T, 4, "float32")
    sample = rows[3:]
    values = np.linalg.eigvalsh(sample @ sample.T)[1:]  # three directions
    assert curvature.mean_square == pytest.approx(values.mean())
    found = curvature.invert(0.5)
    combination, products = found.combination, found.products
    scale = 0.5 * values.mean() / 4
    fisher = sample.T @ sample / 4 + scale * np.eye(20)
    inverse = np.linalg.solve(fisher, rows[:3].T) * scale
    np.testing.assert_allclose(products, inverse.T @ inverse, atol=1e-12)
    lengths = np.linalg.norm(inverse, axis=0)
    expected = inverse / np.where(lengths > 0, lengths, 1)
    np.testing.assert_allclose(rows.T @ combination, expected, atol=1e-12)
    assert not combination[:, 1].any()
    for row, share in zip(sample, found.left_out, strict=True):
        without = np.linalg.solve(fisher - np.outer(row, row) / 4, rows[0])
        assert row @ np.linalg.solve(fisher, rows[0]) == pytest.approx(share * (row @ without))


def test_of_bfloat16_gradients_less_is_above_rounding() -> None:
    gram = np.diag([1.0, 4.0, 1e-5])
    assert measure_curvature(gram, 2, "float32").mean_square == pytest.approx(2.000005)
    assert measure_curvature(gram, 2, "bfloat16").mean_square == pytest.approx(4.0)

"""fuse against the definition, a double loop over examples; and what it takes from its methods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradsift
import reference
from conftest import Write, configure
from gradsift.config import Config
from gradsift.demo.skills import make_examples
from gradsift.errors import ConfigError
from gradsift.methods.fuse import fuse_ranks
from gradsift.pipeline import run
from gradsift.selection.run_result import RunResult
from gradsift.selection.stages import RunStages

Rows = list[dict[str, Any]]


@pytest.fixture
def config(base: Path, write: Write, pool_rows: Rows, target_rows: Rows) -> Config:
    files = {"pool": write("pool.jsonl", pool_rows[:45]), "t": write("t.jsonl", target_rows)}
    return configure(base, files["pool"], {"t": files["t"]}, method="fuse")


def fusing(config: Config, *methods: str) -> Config:
    return Config.build(config.model_dump() | {"fuse": {"methods": methods}})


def scores(result: RunResult) -> np.ndarray:
    return result.scores()["t/score"].to_numpy()


def test_scores_are_sums_of_reciprocal_ranks(config: Config, tmp_path: Path) -> None:
    result = run(config, tmp_path / "run")
    single = [
        scores(run(config.model_copy(update={"method": name}), tmp_path / "alone"))
        for name in ("gist", "rds", "bm25")
    ]
    found = scores(result)
    np.testing.assert_allclose(found, reference.reciprocal_ranks(single), rtol=1e-12)
    best = np.argsort(-found, kind="stable")[:4].tolist()
    assert result.selections["t"].picks["row"].to_pylist() == best
    facts = run(config.model_copy(update={"method": "gist"}), tmp_path / "alone").scores()
    for name in ("loss", "gradient_norm"):  # of the first that knows such things
        assert result.scores()[name].equals(facts[name])


def test_equal_scores_share_the_mean_of_their_ranks() -> None:
    ties = np.array([3.0, 7.0, 3.0, 3.0, 1.0], np.float32)
    other = np.array([0.0, 0.0, 0.0, -np.inf, 5.0])
    expected = [1 / (60 + r) + 1 / (60 + s) for r, s in [(3, 3), (1, 3), (3, 3), (3, 5), (5, 1)]]
    np.testing.assert_allclose(fuse_ranks([ties, other]), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_neither_the_order_of_the_pool_nor_of_the_methods_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.integers(0, 9, 50).astype(np.float32) for _ in range(4)]
    found = fuse_ranks(values)
    np.testing.assert_allclose(found, reference.reciprocal_ranks(values), rtol=1e-12)
    order = rng.permutation(50)
    assert fuse_ranks([own[order] for own in values]).tolist() == found[order].tolist()
    assert fuse_ranks(values[::-1]).tolist() == found.tolist()


def test_scores_of_any_unit_and_scale_are_fused() -> None:
    values = np.array([0.1, 0.4, 0.3])
    same = [fuse_ranks([values, order]) for order in (np.arange(3.0), np.arange(3.0) ** 9 * 1e6)]
    assert same[0].tolist() == same[1].tolist()
    far = np.arange(5_000_000, dtype=np.float32)
    assert len(np.unique(fuse_ranks([far]))) == len(far)  # no ranks that rounding makes equal


def test_a_stage_that_methods_share_is_there_once(config: Config, tmp_path: Path) -> None:
    own = config.model_copy(
        update={"target_path": config.target_path.model_copy(update={"steps": 4})}
    )
    own = fusing(own, "perplexity", "rds", "target-path", "gist", "cosine")
    names = [stage.name for stage in RunStages.of(own)]
    assert len(names) == len(set(names))
    assert {"base/pool", "warmup", "coordinates/t", "cosine/t"} < set(names)
    result = run(own, tmp_path / "run")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("run/*/*.safetensors")}
    for method in own.fuse.methods:  # all that they need is there
        run(own.model_copy(update={"method": method}), tmp_path / "run")
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert (tmp_path / "run/scores/fuse.parquet").exists()
    assert result.seconds.keys() >= {"warmup", "base/pool", "scores/fuse"}


def test_the_settings_of_its_methods_are_its_own(config: Config, tmp_path: Path) -> None:
    one = scores(run(config, tmp_path / "run"))
    manifest = json.loads((tmp_path / "run/manifests/scores/fuse.json").read_text())["inputs"]
    assert manifest["gist"] == {"aggregation": "max", "norm_power": 0.0}
    gist = config.gist.model_copy(update={"norm_power": 1.0})
    other = scores(run(config.model_copy(update={"gist": gist}), tmp_path / "run"))
    assert (one != other).any()
    fewer = scores(run(fusing(config, "gist", "bm25"), tmp_path / "run"))
    assert (one > fewer).all()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["gist", "best"], r"fuse.methods.*: expected one of 'gist', 'less', .* found 'best'"),
        (["gist", "fuse"], r"fuse.methods.*: expected one of 'gist', 'less', .* found 'fuse'"),
        (["rds", "gist", "rds"], r"fuse.methods: expected each method once, found 'rds' more"),
        (["gist"], r"fuse.methods: expected two methods or more, found 1"),
    ],
)
def test_only_other_methods_can_be_fused(
    config: Config, methods: Sequence[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fusing(config, *methods)


def test_what_stops_one_of_its_methods_is_told_before_any_work(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gist = config.gist.model_copy(update={"aggregation": "task-mean"})
    with pytest.raises(ConfigError, match=r"method=cosine has no gist.aggregation=task-mean"):
        run(fusing(config.model_copy(update={"gist": gist}), "cosine", "rds"), tmp_path / "run")
    monkeypatch.setattr("gradsift.errors.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs sentence-transformers: pip install"):
        run(fusing(config, "gist", "embed"), tmp_path / "run")
    policy = config.policy.model_copy(update={"strategy": "round-robin"})
    with pytest.raises(ConfigError, match=r"compares with target examples, and this one does not"):
        run(config.model_copy(update={"policy": policy}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluate_compares_fusions_and_shares_what_they_measure(
    config: Config, tmp_path: Path, write: Write
) -> None:
    run(config, tmp_path / "run")
    tests = {"t": str(write("test.jsonl", make_examples("sql", 6, seed=3)))}
    methods = ["fuse", "fuse:methods=[rds, length]", "gist", "target-path:steps=3"]
    found = gradsift.evaluate(
        tmp_path / "run", tests=tests, methods=methods, seeds=2, random_seeds=3,
        fine_tuning={"steps": 1, "batch_size": 4},
    )  # fmt: skip
    assert [row.method for row in found.rows] == ["base", "random", *methods]
    beside = tmp_path / "run/evaluation/measured"
    kept = sorted(path.name for path in beside.rglob("*") if path.name.endswith(".parquet"))
    assert kept == ["fuse.parquet", "target-path.parquet"]
    assert not [*beside.rglob("coordinates")]

"""Variants, warm-up seeds, parts of a ranking and held-out examples, measured beside the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradsift
from conftest import Write, configure
from gradsift.data.encoded import EncodedSet
from gradsift.errors import ConfigError
from gradsift.evaluation.config import EvaluationConfig
from gradsift.evaluation.fine_tunings import FineTuner
from gradsift.evaluation.grid import find_contenders
from gradsift.evaluation.variants import configure_variant, with_other_seeds
from gradsift.methods.job import Inputs
from gradsift.pipeline import run
from gradsift.runs.opening import read_config
from gradsift.selection.stages import RunStages

SMALL = {"seeds": 2, "random_seeds": 3, "fine_tuning": {"steps": 1, "batch_size": 4}}


@pytest.fixture
def folder(
    base: Path,
    write: Write,
    pool_rows: list[dict[str, Any]],
    target_rows: list[dict[str, Any]],
    tmp_path: Path,
) -> Path:
    """A finished run with a warm-up of its own."""
    target = {"t": write("t.jsonl", target_rows)}
    run(configure(base, write("pool.jsonl", pool_rows), target), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def tests(write: Write) -> dict[str, str]:
    from gradsift.demo.skills import make_examples

    return {"t": str(write("t-test.jsonl", make_examples("sql", 6, seed=3)))}


def evaluate(folder: Path, tests: dict[str, str], **changes: Any) -> gradsift.Evaluation:
    return gradsift.evaluate(folder, tests=tests, **SMALL | changes)


def stages_done(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The stages that were done, in their order."""
    done = [r for r in caplog.records if r.name.endswith("runs.folder") and len(r.args or ()) == 2]
    return [str(record.args[0]) for record in done]  # type: ignore[index]


def passes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The same, by the last part of their names."""
    return [name.rpartition("/")[2] for name in stages_done(caplog)]


@pytest.mark.slow
def test_a_variant_is_the_run_with_that_setting(
    folder: Path, tests: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    methods = ["gist", "gist:aggregation=task-mean,norm_power=1", "gist:rank=2"]
    kept = {path: path.read_bytes() for path in folder.glob("*/*") if path.is_file()}
    with caplog.at_level(logging.INFO, "gradsift"):
        found = evaluate(folder, tests, methods=methods)
    # of the first variant nothing but scores is new, of the second subspace and coordinates
    assert passes(caplog) == ["test.t", "gist", "t", "t", "gist", "exhibits"]
    assert [row.method for row in found.rows] == ["base", "random", *methods]
    assert kept == {path: path.read_bytes() for path in kept}
    config = read_config(folder)
    for name, gist in ((methods[1], {"aggregation": "task-mean", "norm_power": 1}),
                       (methods[2], {"rank": 2})):  # fmt: skip
        alone = gradsift.Config.build(config.model_dump() | {"gist": gist})
        picks = run(alone, tmp_path / name.replace(":", "-")).selections["t"].picks
        asked = EvaluationConfig.build({"tests": tests, "methods": [name]})
        [variant] = find_contenders(RunStages.of(config), asked)
        table = folder / variant.stages[0].scores.outputs[0]
        own = tmp_path / name.replace(":", "-") / "scores/gist.parquet"
        assert table.read_bytes() == own.read_bytes()
        assert len(picks) == 9


@pytest.mark.slow
def test_warm_up_seeds_draw_other_picks(
    folder: Path, tests: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    trained: list[tuple[str, tuple[int, ...], int]] = []
    plain = FineTuner.run

    def noted(self: FineTuner, tuning: Any, *rest: Any) -> None:
        trained.append((tuning.label, tuning.rows, tuning.seed))
        plain(self, tuning, *rest)

    monkeypatch.setattr(FineTuner, "run", noted)
    with caplog.at_level(logging.INFO, "gradsift"):
        found = evaluate(folder, tests, methods=["gist", "cosine", "bm25"], warmup_seeds=2)
    # cosine at the second seed uses the warm-up that gist trained for it
    assert [name for name in passes(caplog) if name == "warmup"] == ["warmup"]
    assert {row.method: row.seeds for row in found.rows}["gist"] == 4
    assert {row.method: row.seeds for row in found.rows}["bm25"] == 2
    gist = [(rows, seed) for label, rows, seed in trained if label.startswith("gist")]
    assert [seed for _, seed in gist] == [0, 1, 2, 3]
    assert gist[0][0] == gist[1][0] != gist[2][0] == gist[3][0]
    other = gradsift.run(with_other_seeds(read_config(folder), 1), folder.parent / "seed-1")
    assert tuple(sorted(other.selections["t"].picks["row"].to_pylist())) == gist[2][0]


def test_parts_of_the_ranking_from_top_to_bottom(
    folder: Path, tests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[int, ...]] = {}
    plain = FineTuner.run

    def noted(self: FineTuner, tuning: Any, *rest: Any) -> None:
        drawn[tuning.label] = tuning.rows
        plain(self, tuning, *rest)

    monkeypatch.setattr(FineTuner, "run", noted)
    evaluate(folder, tests, methods=["length"], quantiles=3)
    lengths = EncodedSet(folder / "data/pool.parquet").column("num_supervised").to_numpy()
    parts = [drawn[f"length for t, part {number} of 3"] for number in (1, 2, 3)]
    assert [len(part) for part in parts] == [9, 9, 9]
    one, two, three = (lengths[list(part)] for part in parts)
    assert one.min() >= two.max() >= two.min() >= three.max()
    with pytest.raises(ConfigError, match=r"18 examples are picked, but each of 6 .* has 15"):
        evaluate(folder, tests, methods=["length"], quantiles=6, budgets=["20%"])


def test_examples_of_equal_score_are_in_no_order(
    folder: Path, tests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradsift.evaluation.doses import plan_doses
    from gradsift.methods.job import open_job
    from gradsift.runs.folder import Run

    job = open_job(RunStages.of(read_config(folder)).inputs, Run(folder))
    asked = EvaluationConfig.build({"tests": tests, "quantiles": 3})
    same = np.zeros(len(job.pool), np.float32)
    drawn = [dose.tuning.rows for dose in plan_doses(job, ("t", "10%"), "x", same, 9, asked)]
    assert len({row for rows in drawn for row in rows}) == 27
    for rows in drawn:  # of the first and the last third of the pool, too
        assert min(rows) < 30
        assert max(rows) > 60


def test_a_variants_policy_is_looked_at_before_the_work(
    folder: Path, tests: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    methods = ["cosine", "gist:policy.source_cap={nosuch: 10%}"]
    with caplog.at_level(logging.INFO, "gradsift"):  # noqa: SIM117
        with pytest.raises(ConfigError, match="names the source 'nosuch', which the pool does not"):
            evaluate(folder, tests, methods=methods)
    assert passes(caplog) == []


@pytest.mark.slow
def test_a_prediction_is_a_sum_of_similarities_with_a_held_out_example(
    folder: Path, tests: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from gradsift.evaluation import evaluate as module

    seen: dict[str, Any] = {}
    plain = module.predict

    def noted(job: Any, stages: Any, held_out: Any, subsets: Any) -> Any:
        seen["rows"] = [subset.rows for subset in subsets]
        seen["found"] = plain(job, stages, held_out, subsets)
        return seen["found"]

    monkeypatch.setattr(module, "predict", noted)
    methods = ["gist", "rds", "length", "gist:warmup.epochs=2"]
    evaluate(folder, tests, methods=methods)
    caplog.clear()
    with caplog.at_level(logging.INFO, "gradsift"):
        evaluate(folder, tests, methods=methods, lds={"measure": True, "subsets": 32})
    # rds has the pool's hidden states already, of any target
    assert passes(caplog).count("pool") == 0
    assert (
        sum("/coordinates/" in name for name in stages_done(caplog)) == 2
    )  # the variant has gradients of its own,
    assert passes(caplog).count("warmup") == 0  # at the warm-up that it had before
    assert [*seen["found"]] == [("t", name) for name in ("gist", "rds", methods[-1])]
    # the same from a run of its own, whose target they are, at the adapter of that run
    config = read_config(folder)
    asked = config.model_dump() | {"warmup": {"adapter": str(folder / "warmup/epoch-1")}}
    asked["data"] |= {"targets": {"t": tests["t"]}}
    for method in ("gist", "rds"):
        alone = gradsift.Config.build(asked | {"method": method})
        run(alone, tmp_path / method)
        from gradsift.methods.job import open_job
        from gradsift.methods.registry import METHODS
        from gradsift.runs.folder import Run

        job = open_job(RunStages.of(alone).inputs, Run(tmp_path / method))
        alike = METHODS[method].scores(job)["t"].with_examples(slice(None))
        assert alike is not None
        sums = np.stack([alike[list(rows)].sum(axis=0) for rows in seen["rows"]])
        np.testing.assert_allclose(seen["found"]["t", method], sums, atol=1e-4)


@pytest.mark.slow
def test_clean_removes_what_is_not_used(folder: Path, tests: dict[str, str]) -> None:
    evaluate(folder, tests, methods=["gist", "gist:rank=2"], quantiles=3)
    cells, measured = (folder / "evaluation" / name for name in ("cells", "measured"))
    everything = {p for p in folder.rglob("*") if p.is_file()}
    evaluate(folder, tests, methods=["gist"], clean=True)
    assert len([*cells.iterdir()]) == 1 + 3 + 2
    assert [*measured.iterdir()] == []
    assert [*(folder / "manifests/evaluation/measured").iterdir()] == []
    kept = {p for p in folder.rglob("*") if p.is_file()}
    gone = {p.relative_to(folder) for p in everything - kept}
    of_evaluation = [p for p in gone if "evaluation" not in p.parts]
    assert (len(gone) > 8, of_evaluation) == (True, [])
    again = evaluate(folder, tests, methods=["gist"])
    assert [row.method for row in again.rows] == ["base", "random", "gist"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bm25:k=2", "method 'bm25:k=2': expected NAME:KEY=VALUE,…; bm25 has no settings of its"),
        ("gist:rang=2", "method 'gist:rang=2': .*did you mean 'gist.rank'"),
        ("gist:model.name=x", "model.name is the same for all methods of an evaluation"),
        ("gist:policy.budget=1%", "policy.budget is the same for all methods"),
        ("gist:rank", "method 'gist:rank': expected NAME:KEY=VALUE,…; those of a section"),
        ("length:policy.strategy=round-robin", "method 'length:.*round-robin needs a method"),
        ("cosine:aggregation=task-mean", "method=cosine has no gist.aggregation=task-mean"),
    ],
)
def test_what_a_user_can_mend(folder: Path, tests: dict[str, str], text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(folder, tests, methods=[text])


def test_settings_of_a_variant(folder: Path) -> None:
    config = read_config(folder)
    turns = config.model_copy(
        update={"policy": config.policy.model_copy(update={"strategy": "balanced"})}
    )
    assert configure_variant(turns, "fuse:methods=[gist, bm25]").fuse.methods == ("gist", "bm25")
    last = configure_variant(config, "gist:norm_power=1, warmup.seed=4294967295")
    assert (last.gist.norm_power, with_other_seeds(last, 2).warmup.seed) == (1, 1)
    found = configure_variant(config, "less:checkpoints=2,policy.strategy=round-robin,seed=3")
    assert (found.method, found.less.checkpoints, found.less.seed) == ("less", 2, 3)
    assert (found.policy.strategy, found.data) == ("round-robin", config.data)
    assert configure_variant(config, "cosine:aggregation=mean-cosine").gist.aggregation == (
        "mean-cosine"
    )
    raised = with_other_seeds(found, 2)
    assert (raised.warmup.seed, raised.less.seed, raised.random.seed) == (2, 5, 2)


def test_what_a_variant_fuses_is_measured_once(folder: Path, tests: dict[str, str]) -> None:
    settings = {"tests": tests, "methods": ["fuse:methods=[cosine, gist]", "fuse"]}
    asked = EvaluationConfig.build(settings)
    one, other = find_contenders(RunStages.of(read_config(folder)), asked)
    [place] = one.stages[0].inputs.places.values()  # of its scores alone
    assert place.endswith("/scores/fuse")
    assert other.stages[0].inputs.places == {}


def test_where_a_stage_is_kept(folder: Path) -> None:
    inputs = RunStages.of(read_config(folder)).inputs
    moved = Inputs(inputs.config, "", {}, {"less/targets/t": "elsewhere/less/targets/t"})
    for name in ("", ".safetensors", "/epoch-1.safetensors"):
        assert moved.at(f"less/targets/t{name}") == f"elsewhere/less/targets/t{name}"
    assert moved.at("less/targets/table.safetensors") == "less/targets/table.safetensors"
    assert moved.at("less/pool") == "less/pool"


def test_warm_up_seeds_need_a_warm_up(
    base: Path, adapter: Path, write: Write, pool_rows: list[dict[str, Any]],
    target_rows: list[dict[str, Any]], tests: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    config = configure(
        base, write("pool.jsonl", pool_rows), {"t": write("t.jsonl", target_rows)},
        warmup={"adapter": str(adapter)}, method="length",
    )  # fmt: skip
    run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="--warmup-seeds repeats the warm-up, but this run"):
        evaluate(tmp_path / "run", tests, methods=["length"], warmup_seeds=2)

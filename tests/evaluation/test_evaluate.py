"""`gradsift evaluate`: fine-tunings done once, resumed, shared; numbers that are the plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import gradsift
import reference
from conftest import Write, configure
from gradsift.data.encoded import EncodedSet
from gradsift.errors import ConfigError, NumericsError
from gradsift.evaluation.config import EvaluationConfig
from gradsift.evaluation.fine_tunings import FineTuner, FineTuning
from gradsift.methods.registry import METHODS
from gradsift.pipeline import run
from gradsift.report.exhibits import read_exhibits
from gradsift.runs.folder import Run
from gradsift.selection.stages import RunStages

Rows = list[dict[str, Any]]
FEW: dict[str, Any] = {"seeds": 2, "random_seeds": 3}
TRAINING = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture
def folder(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> Path:
    """A finished run with two targets."""
    files = {"t": write("t.jsonl", target_rows), "u": write("u.jsonl", target_rows[5:])}
    config = configure(
        base, write("pool.jsonl", pool_rows), files, warmup={"adapter": str(adapter)}
    )
    run(config, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def tests(write: Write) -> dict[str, str]:
    from gradsift.demo.skills import make_examples

    skills = {"t": "sql", "u": "record"}
    return {
        n: str(write(f"{n}-test.jsonl", make_examples(s, 6, seed=3))) for n, s in skills.items()
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the fine-tunings that are run, in order."""
    labels: list[str] = []
    plain = FineTuner.run

    def counted(
        self: FineTuner, tuning: FineTuning, targets: Any, with_tasks: bool = False
    ) -> None:
        labels.append(tuning.label)
        plain(self, tuning, targets, with_tasks)

    monkeypatch.setattr(FineTuner, "run", counted)
    return labels


def evaluate(folder: Path, tests: dict[str, str], **changes: Any) -> gradsift.Evaluation:
    usual: dict[str, Any] = {"methods": ["gist", "length"], "fine_tuning": TRAINING}
    settings = usual | FEW | changes
    return gradsift.evaluate(folder, tests=tests, **settings)


def test_what_an_evaluation_leaves(folder: Path, tests: dict[str, str], trained: list[str]) -> None:
    found = evaluate(folder, tests)
    # base; 3 random; 2 of length, for both targets; 2 of gist for each
    assert len(trained) == len(set(trained)) == 1 + 3 + 2 + 2 * 2
    assert len([*(folder / "evaluation/cells").iterdir()]) == len(trained)
    table = pq.read_table(folder / "evaluation/table.parquet").to_pylist()
    methods = ["base", "random", "gist", "length"]
    assert [(r["target"], r["method"]) for r in table] == [(t, m) for t in "tu" for m in methods]
    trainings = pq.read_table(folder / "evaluation/trainings.parquet").to_pandas()
    for row in table:
        own = trainings[(trainings.target == row["target"]) & (trainings.method == row["method"])]
        assert row["loss"] == pytest.approx(own.loss.mean())
        assert row["accuracy"] == pytest.approx(own.accuracy.mean())
        if row["seeds"] > 1:
            assert row["loss_std"] == pytest.approx(own.loss.std())
    at_random = table[1]
    assert (at_random["seeds"], at_random["difference"]) == (3, None)
    assert table[2]["difference"] == pytest.approx(table[2]["loss"] - at_random["loss"], abs=1e-5)
    assert table[2]["difference_low"] <= table[2]["difference"] <= table[2]["difference_high"]
    page = (folder / "evaluation/report.md").read_text()
    assert page == found.markdown()
    assert f"- {found.verdicts[0]}" in page
    assert "Overlap for t: Jaccard of the picks / Spearman of the scores" in page
    of = RunStages.of(gradsift.Config.build(_config(folder))).selections["t"].fingerprint
    shown = read_exhibits(Run(folder), "evaluation", "t", of)
    titles = ["Does it help? (10%)", "What it cost", "Overlap of the methods"]
    assert [e.title for e in shown] == titles
    assert shown[0].text.startswith(found.verdicts[0])
    [stale, *_] = read_exhibits(Run(folder), "evaluation", "t", "of another selection")
    assert stale.text.startswith("Measured for other picks")
    in_short = "At 10%, " + found.verdicts[0].removeprefix("t, 10%: ")
    assert (shown[0].verdict, shown[0].stale) == (in_short, False)
    assert (stale.verdict, stale.stale) == (in_short, True)
    assert shown[0].figure is not None
    assert shown[0].figure["data"][0]["x"] == methods
    assert [row[0] for row in shown[0].table] == ["method", *methods]
    assert shown[-1].table[1][2] == f"{found.overlaps[0].jaccard:.2f}"
    assert "Does it help? (10%)" in (folder / "report.html").read_text(encoding="utf-8")
    picked = set(gradsift.run(gradsift.Config.build(_config(folder)), folder)
                 .selections["t"].picks["row"].to_pylist())  # fmt: skip
    overlap = pq.read_table(folder / "evaluation/overlap.parquet").to_pylist()
    assert len(overlap) == 6
    lengths = EncodedSet(folder / "data/pool.parquet").table(["num_supervised"])
    longest = np.argsort(-lengths["num_supervised"].to_numpy(), kind="stable")[:9]
    pair = next(o for o in overlap if (o["target"], o["other_target"]) == ("t", "t"))
    shared = len(picked & set(longest.tolist()))
    assert pair["jaccard"] == pytest.approx(shared / (18 - shared))


def _config(folder: Path) -> dict[str, Any]:
    from gradsift.sections import read_yaml

    return read_yaml(folder / "config.yaml")


def test_the_base_model_is_measured_as_it_is(
    base: Path, folder: Path, tests: dict[str, str]
) -> None:
    row = evaluate(folder, tests, methods=["random"]).rows[0]
    encoded = EncodedSet(folder / "evaluation/data/test.t.parquet")
    examples = encoded.examples(range(len(encoded)))
    model = AutoModelForCausalLM.from_pretrained(str(base)).eval()
    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for example in examples:
            own = int(example.supervised.sum())
            total += float(reference.loss(model, example)) * own
            logits = model(input_ids=torch.from_numpy(example.input_ids).long()[None]).logits[0]
            predicted = logits.argmax(-1)[:-1].numpy()
            right += int((predicted == example.input_ids[1:])[example.supervised[1:]].sum())
            count += own
    assert (row.target, row.method, row.seeds) == ("t", "base", 1)
    assert row.loss == pytest.approx(total / count, rel=1e-5)
    assert row.accuracy == pytest.approx(right / count)


@pytest.mark.slow
def test_one_that_was_broken_off_goes_on_where_it_stopped(
    folder: Path, tests: dict[str, str], monkeypatch: pytest.MonkeyPatch, trained: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    counted = FineTuner.run

    def breaks(self: FineTuner, tuning: FineTuning, targets: Any, with_tasks: bool = False) -> None:
        if len(trained) == 4:
            raise KeyboardInterrupt
        counted(self, tuning, targets, with_tasks)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "run", breaks)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder, tests)
    kept = {p: p.stat().st_mtime_ns for p in (folder / "evaluation/cells").iterdir()}
    assert len(kept) == 4
    resumed = evaluate(folder, tests)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    assert len(trained) == len(set(trained)) == 10
    again = evaluate(folder, tests)
    assert len(trained) == 10
    assert again.table().equals(resumed.table())
    for path in (folder / "evaluation/cells").iterdir():
        path.unlink()
    anew = evaluate(folder, tests)
    assert len(trained) == 20
    assert anew.table().equals(resumed.table())


@pytest.mark.slow
def test_more_of_it_trains_only_what_is_new(
    folder: Path, tests: dict[str, str], trained: list[str]
) -> None:
    evaluate(folder, tests, methods=["gist"])
    count = len(trained)
    evaluate(folder, tests, methods=["gist", "random"], seeds=3, full=True)
    assert trained[count:] == [
        "full, seed 0", "full, seed 1", "full, seed 2", "gist for t, 10%, seed 2",
        "gist for u, 10%, seed 2",
    ]  # fmt: skip
    count = len(trained)
    found = evaluate(folder, tests, methods=["gist"], budgets=["10%", "20"])
    assert len(trained) - count == 3 + 4
    sizes = {(row.budget, row.method): row.num_picks for row in found.rows}
    assert (sizes["10%", "gist"], sizes["20", "gist"], sizes["20", "random"]) == (9, 20, 20)


@pytest.mark.slow
def test_fine_tuning_on_the_targets_kind_lowers_its_loss(
    folder: Path, tests: dict[str, str]
) -> None:
    training = TRAINING | {"steps": 25}
    rows = {r.method: r for r in evaluate(folder, tests, fine_tuning=training).rows[:4]}
    assert rows["gist"].loss < rows["base"].loss - 0.2


def test_held_out_examples_in_the_pool_are_told(
    folder: Path, write: Write, pool_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    leaking = {"t": str(write("leak.jsonl", pool_rows[:3]))}
    with caplog.at_level("WARNING", "gradsift"):
        evaluate(folder, leaking, methods=["random"])
    assert "3 of 3 held-out examples of t are in the pool itself" in caplog.text
    assert "in the target itself" not in caplog.text


@pytest.mark.slow
def test_the_linear_datamodeling_score_end_to_end(
    folder: Path, tests: dict[str, str], trained: list[str]
) -> None:
    lds = {"measure": True, "subsets": 32, "sample": 60}
    found = evaluate(folder, {"t": tests["t"]}, lds=lds, fine_tuning=TRAINING | {"steps": 2})
    assert [(s.target, s.method) for s in found.lds] == [
        ("t", "gist")
    ]  # length compares with nothing
    assert all(s.correlation.low <= s.correlation.value <= s.correlation.high for s in found.lds)
    assert sum(label.startswith("subset ") for label in trained) == 32
    assert "Linear datamodeling score" in found.markdown()
    count = len(trained)
    evaluate(folder, tests, methods=["gist"], lds=lds, fine_tuning=TRAINING | {"steps": 2})
    assert [label for label in trained[count:] if "subset" in label] == [
        f"subset {number}" for number in range(1, 33)
    ]  # the second target was not measured yet


def test_a_training_that_diverges_is_an_error(folder: Path, tests: dict[str, str]) -> None:
    with pytest.raises(NumericsError, match=r"of the fine-tuning is nan|not finite after fine-tun"):
        evaluate(folder, tests, fine_tuning=TRAINING | {"learning_rate": 1e30})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tests": {"x": "x.jsonl"}},
            r"examples for 'x', .* no target of this run \(its targets: t, u",
        ),
        (
            {"tests": {}},
            r"tests \(--test NAME=FILE\): expected the name of each target .* found \{\}",
        ),
        (
            {"methods": ["best"]},
            r"methods \(--method\): expected one of gist, less, .*, found 'best'",
        ),
        ({"seeds": 1}, r"seeds \(--seeds\): expected a whole number of at least 2 .* found 1"),
        ({"random_seeds": 2}, r"random_seeds: expected a whole number of at least 3 .* found 2"),
        (
            {"lds": {"subsets": 8}},
            r"lds.subsets: expected a whole number of at least 32 .* found 8",
        ),
        ({"budgets": ["0"]}, "a budget is above 0"),
        ({"fine_tuning": {"step": 3}}, "did you mean 'fine_tuning.steps'"),
        ({"lm_eval": ["a b"]}, "expected the name of a task, found 'a b'"),
    ],
    ids=str,
)
def test_what_a_user_can_mend(
    folder: Path, tests: dict[str, str], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        gradsift.evaluate(folder, **{"tests": tests, **change})


def test_settings_as_text() -> None:
    settings = EvaluationConfig.build({"tests": {"t": "t.jsonl"}, "budgets": ["5%", "5 %", "30"]})
    assert settings.budgets == ("5%", "30")
    assert len(settings.methods) == len(METHODS) - 1
    assert "embed" not in settings.methods
    twice = EvaluationConfig.build({"tests": {"t": "t.jsonl"}, "methods": ["gist", "gist"]})
    assert twice.methods == ("gist",)

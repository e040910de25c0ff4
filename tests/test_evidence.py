"""The evidence run on a tiny model: rows drawn in proportion, parts in one run, tables of each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

import evidence
import evidence_page
from gradsift.demo.skills import make_examples
from gradsift.evaluation.config import EvaluationConfig


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_drawn_in_proportion_and_in_order(tmp_path: Path) -> None:
    rows = [{"id": i, "source": "a" if i % 10 else "b"} for i in range(100)]
    path = write(tmp_path / "pool.jsonl", rows)
    drawn = [json.loads(line) for line in evidence.stratified(path, "source", 25, seed=0)]
    ids = [row["id"] for row in drawn]
    assert ids == sorted(set(ids))
    # of 22.5 and 2.5 the one that is left over goes to the first of equal remainders
    assert Counter(row["source"] for row in drawn) == {"a": 23, "b": 2}
    again, other = (evidence.stratified(path, "source", 25, seed=seed) for seed in (0, 1))
    assert [json.loads(line) for line in again] == drawn
    assert [json.loads(line) for line in other] != drawn
    assert len(evidence.stratified(path, "task", 7, seed=0)) == 7  # none has one
    with pytest.raises(SystemExit, match="100 rows, asked for were 101"):
        evidence.stratified(path, "source", 101, seed=0)


def test_the_configuration_is_one_that_can_be_run() -> None:
    settings = yaml.safe_load(Path(evidence.__file__).with_suffix(".yaml").read_text())
    for part in settings["parts"].values():
        wanted = evidence.part_settings(settings, part)
        EvaluationConfig.build({"tests": {"t": "t.jsonl"}, **wanted})
        assert set(part.get("targets", ())) <= set(settings["targets"])


@pytest.mark.slow
def test_all_parts_are_run_and_shown(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    skills = ("sql", "record", "units")
    pool = [
        {**row, "source": skill} for skill in skills for row in make_examples(skill, 40, seed=0)
    ]
    write(data / "pool.jsonl", pool)
    for target, skill in {"t": "sql", "u": "record"}.items():
        for seed, name in enumerate(("val", "test"), start=1):
            write(data / "targets" / target / f"{name}.jsonl", make_examples(skill, 8, seed=seed))
    few = {"seeds": 2, "random_seeds": 3, "fine_tuning": {"steps": 2, "batch_size": 4}}
    settings = {
        "model": str(base), "data": str(data), "targets": ["t", "u"], "pool_size": 90,
        "held_out": 6, "seed": 0,
        "select": {
            "budget": "10%", "lora": {"rank": 4, "alpha": 8}, "policy": {"decontaminate": "none"},
            "warmup": {"fraction": 0.2, "epochs": 2, "batch_size": 8, "learning_rate": 1e-2},
        },
        "evaluate": few,
        "parts": {
            "methods": {"methods": ["gist", "gist:norm_power=1", "bm25"]},
            "budgets": {"methods": ["bm25"], "budgets": ["5%", "20%"], "targets": ["t"]},
            "doses": {"methods": ["bm25"], "quantiles": 3},
        },
    }  # fmt: skip
    config = tmp_path / "evidence.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = ["evidence.py", "--config", str(config), "--output-dir", str(out), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", command)
    evidence.main()
    evidence_page.main(out)
    page = (out / "page.md").read_text()
    table = pd.read_parquet(out / "results" / "methods" / "table.parquet")
    gist = table[(table.target == "u") & (table.method == "gist")].iloc[0]
    assert f"{gist.difference:+.4f} [{gist.difference_low:+.4f}" in page
    assert page.count("| gist:norm_power=1 |") == 2  # beside random, and beside gist
    assert "\n5%\n" in page
    assert "\n20%\n" in page
    assert "Dose and response" in page
    assert (out / "figure.html").stat().st_size > 10**6  # with plotly in it


def test_ranks_and_differences_of_the_page() -> None:
    losses = {"random": (2.0, 2.2, 2.1), "gist": (1.0, 1.2, 1.1), "gist:x": (1.1, 1.3, 1.2)}
    rows = [
        {"target": "t", "method": method, "seed": seed, "loss": loss}
        for method, own in losses.items()
        for seed, loss in enumerate(own)
    ]
    # 0.1 of 2.1 is 4.76 %; the standard deviation 0.1, √(2/3) of it, t with 4 degrees 2.776
    assert evidence_page.against_gist(pd.DataFrame(rows)).splitlines()[2:] == [
        "| gist:x | +4.76 ± 10.80 | +4.76 ± 10.80 |"
    ]

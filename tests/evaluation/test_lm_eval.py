"""Adapters in lm-evaluation-harness, on a task made here; needs the optional lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gradsift
from conftest import Write, configure
from gradsift.errors import ConfigError
from gradsift.pipeline import run

Rows = list[dict[str, Any]]
pytest.importorskip("lm_eval", reason="the optional lm-eval is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "blue"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_tasks_are_run_with_each_adapter(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = write("colours.jsonl", [{"question": f"colour {i}?", "answer": i % 2} for i in range(4)])
    (tasks / "colours.yaml").write_text(TASK.format(data=data))
    config = configure(
        base, write("pool.jsonl", pool_rows[:40]), {"t": write("t.jsonl", pool_rows[:5])},
        warmup={"adapter": str(adapter)},
    )  # fmt: skip
    run(config, tmp_path / "run")
    given: dict[str, Any] = {
        "tests": {"t": str(write("test.jsonl", pool_rows[40:44]))}, "methods": ["length"],
        "fine_tuning": {"steps": 1, "batch_size": 4}, "lm_eval_include": str(tasks),
    }  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"can run code, .*trust all .*--set trust_remote_code=true"
    ):
        gradsift.evaluate(tmp_path / "run", lm_eval=["colours"], **given)
    given["trust_remote_code"] = True
    with pytest.raises(ConfigError, match=r"knows no task 'flavours'; see lm-eval ls tasks"):
        gradsift.evaluate(tmp_path / "run", lm_eval=["flavours"], **given)
    found = gradsift.evaluate(tmp_path / "run", lm_eval=["colours"], **given)
    for row in found.rows:
        assert row.tasks["colours acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert "colours acc,none" in found.markdown()
    cells = [*(tmp_path / "run/evaluation/cells").iterdir()]
    before = {p: p.stat().st_mtime_ns for p in cells}
    gradsift.evaluate(tmp_path / "run", lm_eval=["colours"], **given)
    assert before == {p: p.stat().st_mtime_ns for p in cells}
    assert json.loads(json.dumps(found.table().to_pylist()))

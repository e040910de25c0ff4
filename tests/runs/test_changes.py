"""What a change of the inputs is called: by the names that its user gave, never by a hash."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from conftest import Write, configure
from gradsift.config import Config
from gradsift.errors import RunError
from gradsift.runs.folder import Run
from gradsift.runs.manifests import describe_change
from gradsift.runs.opening import locked_run
from gradsift.runs.stage import Stage
from gradsift.selection.stages import RunStages

Rows = list[dict[str, Any]]
HASH = re.compile("[0-9a-f]{16}")
ONE, OTHER = "0" * 64, "f" * 64


def change(old: dict[str, Any], new: dict[str, Any]) -> str:
    manifest = {"inputs": Stage("s", old, ()).inputs}
    found = describe_change(manifest, Stage("s", new, ()))
    assert not HASH.search(found)
    return found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"files": {"1 a": ONE, "2 b": ONE}}, {"files": {"1 a": ONE, "2 b": OTHER}},
         "the content of b changed"),
        ({"files": {"1 a": ONE, "2 b": ONE}}, {"files": {"1 b": ONE, "2 c c": ONE}},
         "not read any more: a; new: c c"),
        ({"files": {"1 a": ONE, "2 b": OTHER}}, {"files": {"1 b": OTHER, "2 a": ONE}},
         "the order of the files was a, b, is now b, a"),
        ({"files": {f"{i} {i}": ONE for i in range(1, 9)}},
         {"files": {f"{i} {i}": OTHER for i in range(1, 9)}},
         "the content of 1, 2, 3, 4, 5 and 3 more changed"),
        ({"files": {"1 org/name": "org/name"}}, {"files": {"1 org/name": "org/name"}}, ""),
        ({"model": ONE}, {"model": OTHER}, "the model is another, or its content changed"),
        ({"model": {"identity": ONE, "name": "m"}}, {"model": {"identity": OTHER, "name": "m"}},
         "the content of the model m changed"),
        ({"model": {"identity": ONE, "name": "m"}}, {"model": {"identity": OTHER, "name": "n"}},
         'model.name was "m", is now "n"'),
        ({"template": "t", "template_hash": ONE}, {"template": "t", "template_hash": OTHER},
         "the content of the template t changed"),
        ({"template": None}, {"template": "t", "template_hash": OTHER},
         'template was null, is now "t"'),
        ({"template": "t", "template_hash": ONE}, {"template": "tulu"},
         'template was "t", is now "tulu"'),
        ({"adapter": ONE}, {"adapter": OTHER}, "the adapter is another, or its content changed"),
        ({"adapter": ONE}, {"lora": {"rank": 8}},
         "the adapter is not used any more; lora was not set before"),
        ({"lora": {"rank": 8}}, {"adapter": ONE}, "lora is not set any more; the adapter is new"),
        ({"lora": {"rank": 8}}, {"lora": {"rank": 4}}, "lora.rank was 8, is now 4"),
    ],
)  # fmt: skip
def test_a_change_is_told_by_names(old: dict[str, Any], new: dict[str, Any], said: str) -> None:
    assert change(old, new) == said


def copied(base: Path, adapter: Path, write: Write, rows: Rows) -> tuple[Config, Path]:
    """Return a configuration of which every input is a file beside the pool."""
    pool = write("pool.jsonl", rows[:24])
    here = pool.parent
    shutil.copytree(base, here / "model")
    shutil.copytree(adapter, here / "adapter")
    (here / "template").write_text(tiny_models.CHATML)
    config = configure(
        here / "model", pool, {"t": write("t.jsonl", rows[24:30])},
        warmup={"adapter": str(here / "adapter")}, data={"template": str(here / "template")},
    )  # fmt: skip
    return config, here


def done(folder: Run, stage: Stage) -> None:
    """Do a stage: write nothing into its outputs."""
    with folder.stage(stage) as todo:
        for output in stage.outputs if todo else ():
            (folder.path / output).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / output).touch()


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


def edit_row(path: Path) -> None:
    path.write_text(path.read_text() + json.dumps({"prompt": "q", "completion": "a"}) + "\n")


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("pool.jsonl", edit_row, "data/pool: the content of {here}/pool.jsonl changed"),
        ("t.jsonl", edit_row, "data/target.t: the content of {here}/t.jsonl changed"),
        ("template", append, "data/pool: the content of the template {here}/template changed"),
        ("model/config.json", append, "data/pool: the model is another, or its content changed"),
        (
            "adapter/adapter_config.json",
            append,
            "warmup: the adapter is another, or its content changed",
        ),
    ],
)
def test_what_was_edited_is_named_and_no_hash_is_shown(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, caplog: pytest.LogCaptureFixture,
    name: str, edit: Callable[[Path], None], said: str,
) -> None:  # fmt: skip
    config, here = copied(base, adapter, write, pool_rows)
    expected = said.format(here=here)
    stage_name, _, what = expected.partition(": ")
    with locked_run(here / "run") as folder, caplog.at_level(logging.INFO, "gradsift"):
        for stage in RunStages.of(config):
            done(folder, stage)
        edit(here / name)
        stages = RunStages.of(config)
        with pytest.raises(RunError) as error:
            folder.prepare(stages)
        assert f"made with other settings ({expected})" in str(error.value)
        fault = folder.find_fault(stages)
        assert fault == f"{stage_name} is not as it is to be: {what}"
        for stage in stages:
            done(folder, stage)
    again = [r.getMessage() for r in caplog.records if "is done again" in r.getMessage()]
    assert again[0] == f"{stage_name} is done again: {what}"
    assert len(again) > 3  # and what was made from it
    for text in (str(error.value), *again, fault):
        assert not HASH.search(text.replace(str(here), ""))

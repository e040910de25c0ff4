"""What people do in Python: data in memory, results that show themselves, data sets of picks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

import gradsift
from conftest import QUICK, Write
from gradsift.sections import merge

Rows = list[dict[str, Any]]
SETTINGS = merge(QUICK, {"policy": {"decontaminate": "none"}})


@pytest.fixture
def select(base: Path, tmp_path: Path) -> Callable[..., gradsift.RunResult]:
    def made(folder: str = "run", **given: Any) -> gradsift.RunResult:
        return gradsift.select(
            **{"model": base, "output_dir": tmp_path / folder, "budget": "10%",
               "method": "bm25", "settings": SETTINGS} | given
        )  # fmt: skip

    return made


HELD: dict[str, Callable[[Rows], Any]] = {
    "list": lambda rows: rows,
    "dataset": datasets.Dataset.from_list,
    "stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "arrow": pa.Table.from_pylist,
    "pandas": lambda rows: pa.Table.from_pylist(rows).to_pandas(),
}


@pytest.mark.parametrize("kind", HELD)
def test_rows_in_memory_give_the_picks_of_a_file(
    select: Callable[..., gradsift.RunResult], kind: str,
    write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path,
) -> None:  # fmt: skip
    held = HELD[kind]
    files = select(
        "files", pool=write("pool.jsonl", pool_rows), target=write("target.jsonl", target_rows)
    )
    memory = select("memory", pool=held(pool_rows), target=held(target_rows))
    assert memory.selections["target"].rows() == files.selections["target"].rows()
    named = select("memory", pool=held(pool_rows), target={"target": held(target_rows)})
    assert named.selections["target"].picks.equals(memory.selections["target"].picks)
    assert gradsift.explain(tmp_path / "memory", memory.selections["target"].picks["id"][0].as_py())
    [pool] = (tmp_path / "memory" / "given").glob("*/pool.jsonl")
    assert [json.loads(line) for line in pool.read_text().splitlines()] == pool_rows


def test_another_pool_in_memory_is_noticed_and_takes_nothing_away(
    select: Callable[..., gradsift.RunResult], pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> None:
    first = select(pool=pool_rows, target=target_rows, method="rds")
    with pytest.raises(gradsift.GradsiftError, match="--overwrite"):
        select(pool=pool_rows[:-1], target=target_rows, method="rds")
    again = gradsift.open_run(tmp_path / "run").selections["target"]
    assert again.picks.equals(first.selections["target"].picks)


WRONG = {
    "model=object()": "expected a folder or Hub id, found an object of type object",
    "pool=5": "pool: expected paths, a datasets.Dataset, a list of dicts, or a table of pandas or "
    "Arrow, found int: 5",
    "pool=[1, 2]": "found list: [1, 2]",
    "pool=[]": "pool: expected paths",
    "pool=datasets.DatasetDict(a=datasets.Dataset.from_list([{'x': 1}]))":
    "expected one split of a data set, found all of 'a'",
    "target=1.5": "found float: 1.5",
    "target={3: 't.jsonl'}": "expected a name that is text",
    "target=['a.jsonl', 'b.jsonl']": "a name for each target",
    "target={3: [{}]}": "a target's name becomes a file name",
    "target={'a/b': [{}]}": "a target's name becomes a file name",
    "output_dir=None": "expected the path or URL of a run folder",
    "budget=0.05": "did you mean 5%",
    "method=7": "expected one of 'gist'",
    "settings='lora.rank=8'": "expected settings such as",
    "settings={'lora': 8}": "lora: expected its settings by their names",
}  # fmt: skip
SCRIPT = """
import json, sys, datasets, gradsift
usual = dict(model="m", pool="pool.jsonl", target="t.jsonl", output_dir="run")
for text in json.load(sys.stdin):
    try:
        gradsift.select(**usual | eval(f"dict({text})"))
    except gradsift.GradsiftError as error:
        print(json.dumps(str(error)))
"""


def test_wrong_types_are_said_plainly(tmp_path: Path) -> None:
    found = subprocess.run(  # as users have it: here types are checked before anything runs
        [sys.executable, "-c", SCRIPT], input=json.dumps([*WRONG]), text=True, cwd=tmp_path,
        capture_output=True, check=True,
    )  # fmt: skip
    said = [json.loads(line) for line in found.stdout.splitlines()]
    for (given, words), message in zip(WRONG.items(), said, strict=True):
        assert words in message, given


def test_an_adapter_stands_for_its_model(
    adapter: Path, base: Path, pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> None:
    result = gradsift.select(
        model=adapter, pool=pool_rows, target=target_rows, output_dir=tmp_path / "run",
        settings=SETTINGS,
    )  # fmt: skip
    config = gradsift.Config.build(gradsift.sections.read_yaml(result.path / "config.yaml"))  # type: ignore[attr-defined]
    assert (config.model.name, config.warmup.adapter) == (str(base), str(adapter))


def test_results_show_themselves(
    select: Callable[..., gradsift.RunResult], pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> None:
    rows = [row | {"source": "<b>&"} for row in pool_rows]
    result = select(pool=rows, target={"t": target_rows})
    own = result.selections["t"]
    assert len(repr(own).splitlines()) == len(repr(result).splitlines()) == 3
    assert "9 picks for t" in repr(own)
    assert str(own.path) in repr(own)
    page = result._repr_html_()
    assert "9 picks for t" in page
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert page.count("<tr>") == 1 + 1 + 1 + 5  # two heads, one source, five picks
    opened = gradsift.open_run(tmp_path / "run")
    assert repr(opened) == repr(result)
    assert opened.seconds.keys() == result.seconds.keys()
    assert opened.scores(["t/score"]).equals(result.scores(["t/score"]))
    stage = next(iter(opened.seconds))
    (tmp_path / "run/manifests" / f"{stage}.json").write_text("{")
    assert gradsift.open_run(tmp_path / "run").seconds.keys() == opened.seconds.keys() - {stage}


def test_picks_as_a_data_set(
    select: Callable[..., gradsift.RunResult], pool_rows: Rows, target_rows: Rows
) -> None:
    own = select(pool=pool_rows, target={"t": target_rows}).selections["t"]
    found = own.dataset()
    assert found.column_names == ["id", "source", "score", "messages", "weight"]
    assert found["id"][:] == own.picks["id"].to_pylist()
    assert found["weight"][:] == [1.0] * 9
    by_rank = own.dataset(weights="rank")["weight"][:]
    assert by_rank == sorted(by_rank, reverse=True)
    assert np.mean(by_rank) == pytest.approx(1)
    flat, steep = (own.weights("softmax", temperature) for temperature in (10.0, 0.1))
    assert steep.max() > flat.max() > 1
    about = found.info.description
    assert "- method: bm25" in about
    assert "gradsift select --model" in about
    assert "t, 7 examples" in about
    for row in target_rows:
        assert str(row["messages"][-1]["content"]) not in about


def test_weights_go_into_the_files(
    select: Callable[..., gradsift.RunResult], pool_rows: Rows, target_rows: Rows
) -> None:
    settings = merge(SETTINGS, {"policy": {"weights": "rank"}})
    own = select(pool=pool_rows, target={"t": target_rows}, settings=settings).selections["t"]
    lines = [json.loads(line) for line in own.messages_path.read_text().splitlines()]
    assert [line["weight"] for line in lines] == own.picks["weight"].to_pylist()
    assert own.dataset()["weight"][:] == own.picks["weight"].to_pylist()


def test_the_public_names_are_what_dir_shows() -> None:
    assert dir(gradsift) == sorted([*gradsift.__all__, "__version__"])

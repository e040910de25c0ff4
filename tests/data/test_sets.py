"""Pool and targets together: what is told before the pool is encoded, and in which words."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny_models
from conftest import Write
from gradsift.config import DataConfig
from gradsift.data import sets as sets_module
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoder
from gradsift.data.groups import GroupEncoder
from gradsift.data.schemas import check_schemas
from gradsift.data.sets import data_sets, encode_sets, encoding_stages
from gradsift.data.sources import log_contents, resolve
from gradsift.errors import DataError
from gradsift.runs.opening import locked_run

QA = {"prompt": "q", "completion": "a"}
ALONE = [{"role": "user", "content": "q"}]


def encode(
    run: Path,
    pool: str | Path | Sequence[str],
    targets: dict[str, Path],
    columns: dict[str, str] | None = None,
) -> list[str]:
    """Encode a pool and targets; return the sets for which an encoder was asked."""
    data = DataConfig.build({
        "pool": pool, "targets": {name: str(path) for name, path in targets.items()},
        "columns": columns or {},
    })  # fmt: skip
    sets, loaded = data_sets(data), []

    def load() -> Encoder:
        loaded.append("encoder")
        return Encoder(tiny_models.tokenizer(), 64)

    with locked_run(run) as folder:
        stages = encoding_stages(data, "model", False, sets)
        encode_sets(sets, stages, folder, GroupEncoder(load, data.columns))
    return loaded


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sets in the order in which they are encoded."""
    names: list[str] = []
    whole = sets_module.encode_set

    def encode_set(name: str, *arguments: Any) -> EncodedSet:
        names.append(name)
        return whole(name, *arguments)

    monkeypatch.setattr(sets_module, "encode_set", encode_set)
    return names


@pytest.mark.parametrize(
    ("content", "message", "encoded"),
    [
        ("", r"target\.u is empty: no row in .*u\.jsonl \(the file has no content\); give", ["t"]),
        ('{"text": "x"}\n', r"u\.jsonl:1: no known schema; .* found the columns text", []),
        (json.dumps({"messages": ALONE}), r"target\.u has no usable row in .*1 × no assist", ["t"]),
        ("{broken\n", r"target\.u has no usable row .*1 × not valid JSON", ["t"]),
        (None, r"no such file: '.*u\.jsonl'", []),
    ],
)
def test_a_target_that_cannot_be_used_is_told_before_the_pool_is_encoded(
    tmp_path: Path,
    write: Write,
    order: list[str],
    content: str | None,
    message: str,
    encoded: list[str],
) -> None:
    pool, good = write("pool.jsonl", [QA] * 3), write("t.jsonl", [QA])
    if content is not None:
        (tmp_path / "u.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        encode(tmp_path / "run", pool, {"t": good, "u": tmp_path / "u.jsonl"})
    assert [name for name in order if name != "target.u"] == [f"target.{n}" for n in encoded]


def test_every_file_of_the_pool_is_looked_at_before_a_target_is_encoded(
    tmp_path: Path, write: Write, order: list[str]
) -> None:
    write("a.jsonl", [QA])
    write("b.jsonl", ["{broken", {"text": "x"}])
    target = write("t.json", [QA])
    with pytest.raises(DataError, match=r"b\.jsonl:2: no known schema"):
        encode(tmp_path / "run", str(tmp_path / "*.jsonl"), {"t": target})
    assert order == []


def test_targets_are_encoded_first_and_nothing_twice(
    tmp_path: Path, write: Write, order: list[str]
) -> None:
    pool, target = write("pool.jsonl", [QA] * 3), write("t.jsonl", [QA])
    assert encode(tmp_path / "run", pool, {"t": target}) == ["encoder"]
    assert order == ["target.t", "pool"]
    assert encode(tmp_path / "run", pool, {"t": target}) == []
    assert order == ["target.t", "pool"]


def test_of_a_file_only_the_beginning_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of big files of every kind, the rest may even be broken; of the Hub nothing is asked."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked twice"))
    names = ["a.jsonl", "b.json", "c.csv"]
    (tmp_path / "a.jsonl").write_text((json.dumps(QA) + "\n") * 2 + "{broken")
    (tmp_path / "b.json").write_text(f"[ {json.dumps(QA)}, {{broken")
    (tmp_path / "c.csv").write_text('prompt,completion\nq,a\n"broken')
    check_schemas(resolve([*(str(tmp_path / name) for name in names), "org/name"]), {})
    big = json.dumps([{"text": "x" * (1 << 20)}])  # its end is too far: the encoding will tell
    (tmp_path / "b.json").write_text(big)
    check_schemas(resolve([str(tmp_path / "b.json")]), {})


@pytest.mark.parametrize("kind", ["jsonl", "json", "lines.json", "csv", "parquet"])
def test_unknown_columns_are_told_by_the_first_rows_of_every_kind(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["x"]}), path)
    else:
        row = json.dumps({"text": "x"})
        path.write_text({"json": f"[{row}]", "csv": "text\nx\n"}.get(kind, f"{row}\n"))
    with pytest.raises(DataError, match=r"no known schema; .*found the columns text$"):
        check_schemas(resolve([str(path)]), {})


@pytest.mark.parametrize(
    ("name", "content", "how"),
    [
        ("a.jsonl", b"", "the file has no content"),
        ("a.jsonl", b"\n\n", "it has no row"),
        ("a.json", b" [ ]\n", "it holds an empty list or nothing"),
        ("a.csv", b"prompt,completion\n", "it has no row below a header"),
        ("a.csv", b"", "the file has no content"),
        ("a.parquet", None, "it has columns and no row"),
    ],
)
def test_files_without_rows_are_told(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture,
    name: str, content: bytes | None, how: str,
) -> None:  # fmt: skip
    if content is None:
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    pool, empty = write("pool.jsonl", [QA]), tmp_path / name
    with pytest.raises(DataError) as error:
        encode(tmp_path / "run", pool, {"t": empty})
    assert str(error.value) == (
        f"target.t is empty: no row in {empty} ({how}); give files that have rows"
    )
    encode(tmp_path / "other", [str(pool), str(empty)], {"t": pool})
    assert f"{empty} has no row: {how}" in caplog.text


def test_a_file_named_more_than_once_is_read_once_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / "data" / name).write_text(json.dumps(QA) + "\n")
    (tmp_path / "link.jsonl").symlink_to("data/b.jsonl")
    monkeypatch.chdir(tmp_path)
    specs = [
        "data/b.jsonl", "./data/b.jsonl", "link.jsonl", "data", "data/[ab].jsonl",
        f"{tmp_path}/data/c.jsonl", "org/name", "org/name", "org/name:test",
    ]  # fmt: skip
    found = [source.name for source in resolve(specs)]
    assert found == [
        "data/b.jsonl", "data/a.jsonl", "data/c.jsonl", "org/name", "org/name:test",
    ]  # fmt: skip
    log_contents(specs)
    assert (
        "named more than once, and read once: data/b.jsonl = ./data/b.jsonl = link.jsonl = "
        "data/b.jsonl = data/b.jsonl; data/a.jsonl = data/a.jsonl; data/c.jsonl = "
        f"{tmp_path}/data/c.jsonl; org/name = org/name"
    ) in caplog.text
    caplog.clear()
    log_contents(["data/a.jsonl", "link.jsonl"])
    assert "more than once" not in caplog.text
    encode(tmp_path / "run", ["data/a.jsonl", "./data/a.jsonl", "data"], {"t": Path("link.jsonl")})
    assert "named more than once, and read once: data/a.jsonl = ./data/a.jsonl" in caplog.text
    encoded = EncodedSet(tmp_path / "run/data/pool.parquet")
    assert encoded.table(["id"])["id"].to_pylist() == ["a-1", "b-1", "c-1"]
    assert os.path.realpath("link.jsonl") == str(tmp_path / "data/b.jsonl")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"message": ALONE}, "perhaps --set data.columns.messages=message"),
        ({"Conversation": ALONE}, "perhaps --set data.columns.messages=Conversation"),
        ({"Instruction": "q", "response": "a"},
         "perhaps --set data.columns.prompt=Instruction --set data.columns.completion=response"),
        ({"question": "q", "Answer": "a", "level": 1},
         "perhaps --set data.columns.prompt=question --set data.columns.completion=Answer"),
        ({"Instruction": "q", "Input": "i", "Output": "a"}, ""),  # two that may be the prompt
        ({"text": "x"}, ""),
    ],
)  # fmt: skip
def test_columns_that_are_nearly_known_come_with_the_settings_that_map_them(
    tmp_path: Path, write: Write, row: dict[str, Any], hint: str
) -> None:
    path = write("a.jsonl", [row])
    with pytest.raises(DataError) as error:
        check_schemas(resolve([str(path)]), {})
    assert str(error.value).endswith(f"found the columns {', '.join(row)}{hint and '; '}{hint}")
    if hint:
        pairs = [part.split("=") for part in hint.split() if "=" in part]
        columns = {field.rpartition(".")[2]: name for field, name in pairs}
        check_schemas(resolve([str(path)]), columns)


def test_a_mapped_column_that_is_misspelt_comes_with_the_nearest(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write("a.jsonl", [{"question": "q", "completion": "a"}])
    with pytest.raises(DataError) as error:
        encode(tmp_path / "run", path, {"t": path}, {"prompt": "questoin"})
    assert str(error.value).endswith(
        "no column 'questoin' as mapped by data.columns.prompt; did you mean 'question'?"
    )
    path = write("b.jsonl", [{**QA, "dataset": "x"}])
    encode(tmp_path / "run", path, {"t": path}, {"source": "datset", "task": "kind"})
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    lacking = (
        "no column 'datset' as mapped by data.columns.source; did you mean 'dataset'?, "
        "no column 'kind' as mapped by data.columns.task"
    )
    assert f"{path}: prompt-completion ({lacking})" in warned


@pytest.mark.slow
def test_several_processes_encode_to_the_same_bytes(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradsift.data import encoded
    from gradsift.executors import base

    rows = [json.dumps(QA | {"prompt": f"question {number}"}) for number in range(200)]
    for number in range(3, 200, 17):
        rows[number] = "{"
    pool, target = write("pool.jsonl", rows), write("t.jsonl", [QA])
    monkeypatch.setattr(encoded, "_GROUP", 8)
    found = []
    for few in (1000, 1):  # all of them here; all but one elsewhere
        monkeypatch.setattr(base, "FEW", few)
        encode(tmp_path / str(few), pool, {"t": target})
        folder = tmp_path / str(few) / "data"
        names = ("pool.parquet", "pool.rejected.jsonl")
        found.append([(folder / name).read_bytes() for name in names])
    assert found[0] == found[1]
    lines = [json.loads(line)["line"] for line in found[0][1].splitlines()]
    assert lines == [*range(4, 201, 17)]

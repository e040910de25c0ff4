"""A folder as a pool: every data file in it, each as if it were named itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny_models
from gradsift.data.encoded import EncodedSet, encode_set
from gradsift.data.encoding import Encoder
from gradsift.data.groups import GroupEncoder
from gradsift.data.sources import log_contents, resolve
from gradsift.errors import DataError


def rows(word: str, count: int = 2) -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {i}", "completion": f"0{i}", "id": str(i)} for i in range(count)]


def put(path: Path, *given: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in given)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def encode(place: Path, *specs: str | Path) -> EncodedSet:
    sources = resolve([str(spec) for spec in specs])
    return encode_set(
        "pool", sources, GroupEncoder(lambda: Encoder(tiny_models.tokenizer(), 64), {}),
        place / "encoded",
    )  # fmt: skip


def rejected(place: Path) -> list[dict[str, Any]]:
    text = (place / "encoded/pool.rejected.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of all kinds and schemas, one of them with a broken line, in folders of two levels."""
    into = tmp_path / "pool"
    put(into / "train.jsonl", *rows("train"))
    put(into / "test.jsonl", *rows("test"), "{broken")
    put(into / "b/deep.jsonl", {"instruction": "q", "output": "a", "id": "7"})
    (into / "a.csv").write_text("prompt,completion,id,day\nx,007,7,2024-01-31\n")
    (into / "array.json").write_text(json.dumps(rows("array", 1)))
    pq.write_table(pa.Table.from_pylist(rows("parquet", 1)), into / "z.parquet")
    return into


def test_every_data_file_is_read_as_if_it_were_named(folder: Path, tmp_path: Path) -> None:
    files = [
        folder / name
        for name in ("a.csv", "array.json", "b/deep.jsonl", "test.jsonl", "train.jsonl",
                     "z.parquet")
    ]  # fmt: skip
    columns = ["id", "source", "file", "line", "raw"]
    named = encode(tmp_path / "one", *files).table(columns)
    whole = encode(tmp_path / "other", folder).table(columns)
    assert whole.equals(named)
    assert whole.num_rows == 8
    assert whole["file"].to_pylist()[0] == str(files[0])
    assert whole["id"].to_pylist()[:3] == ["7", "0", "7"]  # nothing was retyped
    assert json.loads(whole["raw"].to_pylist()[0])["day"] == "2024-01-31"
    [reason] = rejected(tmp_path / "other")
    assert (reason["file"], reason["line"]) == (str(folder / "test.jsonl"), 3)


def test_what_was_taken_and_left_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(folder / "README.md", "x")
    put(folder / "b/.hidden.jsonl", "x")
    put(folder / ".git/config.json", "x")
    put(folder / "dataset_info.json", "{}")
    assert len(encode(tmp_path, folder)) == 8
    for spec in (folder, tmp_path / "p*"):
        caplog.clear()
        with caplog.at_level("INFO", "gradsift"):
            log_contents([str(spec)])
        names = "a.csv, array.json, b/deep.jsonl, test.jsonl, train.jsonl, z.parquet"
        assert f"{folder}: taken: {names}" in caplog.text
        assert f"{folder}: left: .git, README.md, b/.hidden.jsonl, dataset_info" in caplog.text


def test_a_folder_without_data_says_what_it_has(tmp_path: Path) -> None:
    put(tmp_path / "none/notes.txt", "x")
    with pytest.raises(DataError, match=r"none' has no data file; expected some of .* found notes"):
        resolve([str(tmp_path / "none")])


def test_folders_that_lie_in_themselves_are_read_once(tmp_path: Path) -> None:
    put(tmp_path / "pool/a/x.jsonl", *rows("x"))
    (tmp_path / "pool/a/again").symlink_to(tmp_path / "pool", target_is_directory=True)
    put(tmp_path / "elsewhere/y.jsonl", *rows("y"))
    (tmp_path / "pool/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert encode(tmp_path, tmp_path / "pool").table(["source"])["source"].to_pylist() == [
        "x", "x", "y", "y",
    ]  # fmt: skip


def test_a_schema_of_its_own_for_each_file(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    put(tmp_path / "pool/a.jsonl", {"messages": turns})
    put(tmp_path / "pool/b.jsonl", {"instruction": "q", "output": "a", "input": 5, "id": 1})
    put(tmp_path / "pool/c.jsonl", {"instruction": "q", "output": "a"})
    assert encode(tmp_path, tmp_path / "pool").table(["schema"])["schema"].to_pylist() == [
        "messages", "alpaca",
    ]  # fmt: skip
    assert rejected(tmp_path)[0]["reason"] == "input is a int, expected text"


def saved(path: Path) -> Path:
    tables = {name: datasets.Dataset.from_list(rows(name)) for name in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(path)
    return path


def test_what_save_to_disk_wrote_is_read_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "saved")

    def prompts(spec: str | Path) -> list[str]:
        encoded = encode(tmp_path, spec)
        return [c[0]["content"] for c in encoded.conversations(range(len(encoded)), {})]

    assert prompts(folder) == prompts(f"{folder}:train") == ["train 0", "train 1"]
    assert prompts(f"{folder}:test") == prompts(folder / "test") == ["test 0", "test 1"]
    assert prompts(f"{folder}:all") == ["train 0", "train 1", "test 0", "test 1"]
    assert prompts(tmp_path / "saved*") == ["train 0", "train 1"]
    with caplog.at_level("INFO", "gradsift"):
        log_contents([str(folder), f"{folder}:test"])
    assert f"{folder}: taken: train" in caplog.text
    assert f"{folder}: left: test" in caplog.text
    assert f"{folder}: taken: test" in caplog.text
    assert f"{folder}: left: train" in caplog.text
    with pytest.raises(DataError, match=r"saved' has the splits train, test; name one as .*:SPLIT"):
        resolve([f"{folder}:validation"])
    (folder / "dataset_dict.json").write_text("[]")
    with pytest.raises(DataError, match=r"cannot read the splits of '.*saved'"):
        resolve([str(folder)])
    shutil.rmtree(folder / "test")
    (folder / "train/state.json").write_text("[]")
    with pytest.raises(DataError, match=r"cannot read '.*train'"):
        encode(tmp_path, folder / "train")


def test_a_saved_data_set_is_read_as_it_is_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pa.Table.from_pylist(
        [{**row, "picture": {"bytes": b"none", "path": None}} for row in rows("x", 3)]
    )
    features = datasets.Features.from_arrow_schema(table.schema) | {"picture": datasets.Image()}
    schema = datasets.Features(features).arrow_schema
    data = datasets.Dataset(table.cast(schema))
    data.with_format(columns=["prompt", "completion"]).save_to_disk(tmp_path / "columns")
    data.select([2, 0]).with_format("numpy").save_to_disk(tmp_path / "some")
    data.select([]).save_to_disk(tmp_path / "none")
    assert encode(tmp_path, tmp_path / "columns").table(["id"])["id"].to_pylist() == [
        "0", "1", "2",
    ]  # fmt: skip
    assert encode(tmp_path, tmp_path / "some").table(["id"])["id"].to_pylist() == ["2", "0"]
    with pytest.raises(DataError, match=r"cannot read '.*none'"):
        encode(tmp_path, tmp_path / "none")
    put(tmp_path / "some/more.jsonl", *rows("more"))
    with caplog.at_level("INFO", "gradsift"):
        log_contents([str(tmp_path / "some")])
    assert f"{tmp_path}/some: taken: the data set saved there" in caplog.text
    assert f"{tmp_path}/some: left: more.jsonl" in caplog.text
    (tmp_path / "some/dataset_info.json").write_text("[]")
    with pytest.raises(DataError, match=r"cannot read '.*some'"):
        encode(tmp_path, tmp_path / "some")


def test_a_pipe_in_a_folder_is_no_file(tmp_path: Path) -> None:
    put(tmp_path / "pool/a.jsonl", *rows("a"))
    os.mkfifo(tmp_path / "pool/b.jsonl")
    assert len(encode(tmp_path, tmp_path / "pool")) == 2


def test_of_a_hub_data_set_the_splits_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = {
        name: datasets.Dataset.from_list(rows(name)).to_iterable_dataset()
        for name in ("validation", "train", "test")
    }
    asked: list[Any] = []

    def load(name: str, config: str | None, streaming: bool) -> Any:
        asked.append((name, config, streaming))
        return hub

    monkeypatch.setattr(datasets, "load_dataset", load)
    with caplog.at_level("INFO", "gradsift"):
        assert len(encode(tmp_path, "org/name")) == 2
    assert "org/name: split train of validation, train, test" in caplog.text
    assert len(encode(tmp_path, "org/name/config:all")) == 6
    assert asked[-1] == ("org/name", "config", True)
    with pytest.raises(DataError, match="has the splits validation, train, test; name one as"):
        encode(tmp_path, "org/name:dev")
    del hub["train"]
    with pytest.raises(DataError, match="or org/name:all"):
        encode(tmp_path, "org/name")


def test_a_data_set_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError, match="cannot read 'org/name': RuntimeError: Dataset scripts are no"
    ):
        encode(tmp_path, "org/name")


def test_folders_above_a_glob_need_not_be_listed(tmp_path: Path) -> None:
    put(tmp_path / "above/data/a.jsonl", *rows("a"))
    code = (
        "import sys; from gradsift.data.sources import resolve\n"
        "print(len(resolve(sys.argv[1:])), [source.name for source in resolve(sys.argv[1:])])"
    )
    (tmp_path / "above").chmod(0o111)
    try:
        for pattern in ("*.jsonl", "**/*.jsonl"):
            found = as_an_ordinary_user(
                sys.executable, "-c", code, tmp_path / "above/data" / pattern
            )
            assert found.stdout == f"1 ['{tmp_path}/above/data/a.jsonl']\n", found.stderr
    finally:
        (tmp_path / "above").chmod(0o755)


def test_a_split_of_a_folder_that_has_none_is_told(tmp_path: Path) -> None:
    put(tmp_path / "org/name/a.jsonl", *rows("a"))
    with pytest.raises(DataError, match=r"the folder '.*org/name' has no splits"):
        resolve([f"{tmp_path}/org/name:train"])


def as_an_ordinary_user(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command without the right to read what its owner may not."""
    command = [str(argument) for argument in arguments]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv, which takes root's privileges away, is not installed")
        drop = "--bounding-set=-dac_override,-dac_read_search"
        command = ["setpriv", drop, *command]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("hidden", ["pool/b", "pool/b/deep.jsonl", "model/config.json", "template"])
def test_what_may_not_be_read_is_named(
    folder: Path, base: Path, tmp_path: Path, hidden: str
) -> None:
    shutil.copytree(base, tmp_path / "model")
    put(tmp_path / "template", tiny_models.CHATML)
    target = put(tmp_path / "t.jsonl", *rows("t"))
    (tmp_path / hidden).chmod(0)
    try:
        for pool in (folder, f"{folder}/**/*.jsonl"):
            found = as_an_ordinary_user(
                sys.executable, "-m", "gradsift", "select", "--model", tmp_path / "model",
                "--pool", pool, "--target", target, "--output-dir", tmp_path / "run",
                "--method", "length", "--set", f"data.template={tmp_path / 'template'}",
            )  # fmt: skip
            assert found.returncode == 2, found.stderr
            assert "Traceback" not in found.stderr
            assert str(tmp_path / hidden) in found.stderr
            assert "Permission denied" in found.stderr
    finally:
        (tmp_path / hidden).chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["manifests/data/pool.json", "data/pool.parquet", "config.yaml"])
def test_what_may_not_be_read_of_a_run_folder_is_named(
    folder: Path, base: Path, tmp_path: Path, hidden: str
) -> None:
    target = put(tmp_path / "t.jsonl", *rows("t"))
    made = tmp_path / "run"
    select = [
        sys.executable, "-m", "gradsift", "select", "--model", base, "--pool", folder,
        "--target", target, "--output-dir", made, "--method", "length",
    ]  # fmt: skip
    assert as_an_ordinary_user(*select).returncode == 0
    (made / hidden).chmod(0)
    for command in (select, [*select[:3], "report", made], [*select[:3], "explain", made, "0"]):
        found = as_an_ordinary_user(*command)
        assert found.returncode == 2, found.stderr
        assert "Traceback" not in found.stderr
        assert str(made / hidden) in found.stderr

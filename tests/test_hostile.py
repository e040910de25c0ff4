"""Rows, settings and places that nobody would write on purpose: told, never a traceback."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradsift
import tiny_models
from conftest import Write, configure
from gradsift.cli import main
from gradsift.config import Config, ModelConfig
from gradsift.data.encoded import EncodedSet, encode_set
from gradsift.data.encoding import Encoder
from gradsift.data.groups import GroupEncoder
from gradsift.data.sources import resolve
from gradsift.errors import ConfigError, DataError, RunError, translate_os_errors, visible
from gradsift.models.adapters import load_adapter, save_adapter
from gradsift.models.loading import load_base
from gradsift.pipeline import run
from gradsift.progress import LogFile
from gradsift.runs.opening import locked_run
from gradsift.sections import parse_assignment, read_yaml
from gradsift.types import Budget

Rows = list[dict[str, Any]]
GOOD = {"prompt": "q", "completion": "a"}


def encode(tmp_path: Path, content: bytes, name: str = "pool.jsonl") -> EncodedSet:
    (tmp_path / name).write_bytes(content)
    encoder = Encoder(tiny_models.tokenizer(), 64)
    encode, sources = GroupEncoder(lambda: encoder, {}), resolve([str(tmp_path / name)])
    return encode_set("pool", sources, encode, tmp_path / "data")


def reasons(tmp_path: Path) -> dict[int, str]:
    lines = (tmp_path / "data/pool.rejected.jsonl").read_text().splitlines()
    return {row["line"]: row["reason"] for row in map(json.loads, lines)}


LINE = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xef\xbb\xbf" + LINE.encode(), "not valid JSON: Unexpected UTF-8 BOM"),
        (LINE.encode("utf-16"), "not valid UTF-8 at byte 0"),
        (LINE.encode("utf-16-le"), "not valid JSON"),
        (LINE.encode("utf-16-be"), "not valid JSON"),
        (LINE.encode("utf-32"), "not valid UTF-8 at byte 0"),
        (LINE.encode("utf-32-be"), "not valid JSON"),
        (LINE.replace("q", "é").encode("latin-1"), "not valid UTF-8 at byte 12"),
        (LINE[:-1].encode() + b', "x": NaN}', "not readable JSON: NaN is no JSON value"),
        (LINE[:-1].encode() + b', "x": ' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper than"),
        (LINE[:-1].encode() + b', "x": ' + b"[" * 9999 + b"]" * 9999 + b"}", "nested deeper than"),
        (LINE[:-1].encode() + b', "x": ' + b'{"a":' * 150 + b"1" + b"}" * 151, "nested deeper"),
    ],
    ids=str,
)
def test_lines_that_other_readers_would_not_read_are_rejected(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    good = LINE.encode()
    encoded = encode(tmp_path, b"\xef\xbb\xbf" + good + b"\n" + line + b"\n" + good + b"\n")
    assert encoded.table(["line"])["line"].to_pylist() == [1, 3]
    [found] = reasons(tmp_path).values()
    assert found.startswith(reason)


def test_rows_at_the_limit_of_nesting_come_through_to_the_picks(
    base: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    deep: Any = 1
    for _ in range(98):
        deep = [deep]
    rows = [{**row, "extra": deep} for row in pool_rows[:20]]
    config = configure(
        base, write("pool.jsonl", rows), {"t": write("t.jsonl", pool_rows[20:25])},
        method="length", policy={"decontaminate": "near", "duplicates": "near"},
    )  # fmt: skip
    assert run(config, tmp_path / "run").num_rejected == 0


def test_a_carriage_return_between_tokens_breaks_no_entry(
    base: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    lines = [json.dumps(row).replace('", "', '",\r"') for row in pool_rows[:20]]
    pool = tmp_path / "pool.jsonl"
    pool.write_bytes("".join(line + "\n" for line in lines).encode())
    target = write("t.jsonl", pool_rows[20:25])
    config = configure(base, pool, {"t": target}, method="length")
    run(config, tmp_path / "run")
    run(config, tmp_path / "run")
    entry = json.loads((tmp_path / "run/selected/dataset_info.json").read_text())
    assert entry["gradsift_t"]["file_name"] == "t.messages.jsonl"
    picked = (tmp_path / "run/selected/t.jsonl").read_bytes().split(b"\n")
    assert all(line.decode() in lines for line in picked if line)


def test_tables_hold_what_json_does_not(tmp_path: Path) -> None:
    rows = [{**GOOD, "x": float("nan"), "y": [1.0, float("inf")], "z": b"bytes"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    encoded = encode(tmp_path, (tmp_path / "pool.parquet").read_bytes(), "pool.parquet")
    [raw] = encoded.take([0], ["raw"])["raw"].to_pylist()
    assert json.loads(raw) == {**GOOD, "x": None, "y": [1.0, None], "z": "b'bytes'"}
    assert b"NaN" not in raw
    rows = b'{"x": NaN}, {"prompt": "q", "completion": "a"}, {"x": [{"y": 1, "y": 2}]}, '
    array = b" " * 5000 + b"[" + rows + b"[" * 150 + b"]" * 151
    encoded = encode(tmp_path, array, "pool.json")
    assert encoded.table(["line"])["line"].to_pylist() == [2]
    no_value = "it has NaN or Infinity, which are no JSON, or a key that stands twice in an object"
    assert reasons(tmp_path) == {1: no_value, 3: no_value, 4: "expected a JSON object, found list"}
    with pytest.raises(DataError, match="is not valid JSON"):
        encode(tmp_path, b"[" * 9999 + b"]" * 9999, "pool.json")


def test_names_that_stand_twice_are_told(tmp_path: Path) -> None:
    twice = '{"prompt": "lost", "prompt": "q", "completion": "a"}'
    assert len(encode(tmp_path, f"{twice}\n{LINE}\n".encode())) == 1
    assert reasons(tmp_path)[1].endswith("the key 'prompt' stands twice in an object")
    assert len(encode(tmp_path, b"prompt,completion,,\nq,a,,\n", "pool.csv")) == 1
    with pytest.raises(DataError, match=r"pool\.csv has the column 'prompt' twice; rename or"):
        encode(tmp_path, b"prompt,prompt,completion\nlost,q,a\n", "pool.csv")
    table = pa.table([["lost"], ["q"], ["a"]], names=["prompt", "prompt", "completion"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"pool\.parquet has the column 'prompt' twice"):
        encode(tmp_path, (tmp_path / "twice.parquet").read_bytes(), "pool.parquet")


def test_dates_beyond_those_of_python_are_told(tmp_path: Path) -> None:
    for values in (pa.array([2**51], pa.timestamp("s")), pa.array([2**30], pa.date32())):
        table = pa.table({"prompt": ["q"], "completion": ["a"], "day": values})
        pq.write_table(table, tmp_path / "day.parquet")
        with pytest.raises(DataError, match=r"cannot read '.*pool\.parquet' after row 0"):
            encode(tmp_path, (tmp_path / "day.parquet").read_bytes(), "pool.parquet")


def test_the_last_ending_tells_the_separator(tmp_path: Path) -> None:
    assert len(encode(tmp_path, b"prompt\tcompletion\nq\ta\n", "export.csv.tsv")) == 1


def test_a_mapped_column_that_a_file_lacks_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pool.jsonl").write_text(LINE)
    encoder, sources = Encoder(tiny_models.tokenizer(), 64), resolve([str(tmp_path / "pool.jsonl")])
    with caplog.at_level("INFO", "gradsift"):
        encode = GroupEncoder(lambda: encoder, {"messages": "nope"})
        encode_set("pool", sources, encode, tmp_path / "data")
    assert "prompt-completion (no column 'nope' as mapped by data.columns.messages)" in caplog.text


def test_a_role_of_50_megabytes_is_cut_wherever_it_is_told(tmp_path: Path) -> None:
    role = "x" * 50_000_000
    bad = json.dumps({"messages": [{"role": role, "content": "x"}]})
    good = json.dumps({"messages": [{"role": "user", "content": "q"},
                                    {"role": "assistant", "content": "a"}]})  # fmt: skip
    assert len(encode(tmp_path, f"{good}\n{bad}\n".encode())) == 1
    assert (tmp_path / "data/pool.rejected.jsonl").stat().st_size < 1000
    assert "unknown role 'xxx" in reasons(tmp_path)[2]
    with pytest.raises(DataError) as error:
        encode(tmp_path, json.dumps({role: 1}).encode())
    assert len(str(error.value)) < 2000


HOSTILE = "\x1b[31mred\x1b]0;title\x07\u202e"


def test_escape_sequences_are_shown_and_not_sent(
    base: Path, write: Write, pool_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [{**row, "source": HOSTILE, "id": HOSTILE + row["id"]} for row in pool_rows[:20]]
    pool, target = write("pool.jsonl", rows), write("t.jsonl", pool_rows[20:25])
    out = tmp_path / "run"
    columns = write("columns.jsonl", [{HOSTILE: 1}])

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["gradsift", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    common = ["--model", base, "--target", target, "--method", "length"]
    assert call("select", *common, "--pool", pool, "--output-dir", out) == 0
    picked = (out / "selected/t.jsonl").read_text().splitlines()[0]
    assert call("explain", out, json.loads(picked)["id"]) == 0
    assert call("explain", out, HOSTILE) == 2
    assert call("select", *common, "--pool", columns, "--output-dir", tmp_path / "other") == 2
    assert call("select", *common, "--pool", HOSTILE, "--output-dir", tmp_path / "third") == 2
    captured = capsys.readouterr()
    for text in (captured.out, captured.err, (out / "log.txt").read_text()):
        assert "\x1b" not in text.replace("\x1b[31m\x1b[0m", "")
        assert "\x07" not in text
        assert "\u202e" not in text
    assert "\\x1b[31mred" in captured.out
    assert "\\x1b[31mred" in captured.err


def test_what_is_visible_stays() -> None:
    assert visible("plain é 漢字 😀\n\ttext") == "plain é 漢字 😀\n\ttext"
    assert visible("\r\x00\x9b\ud800") == "\\r\\x00\\x9b\\ud800"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "data.pool=5",
            "data.pool (--pool): expected a path or Hub id, or a list of them, found 5",
        ),
        (
            "data.pool={a: b}",
            "data.pool (--pool): expected a path or Hub id, or a list of them, found {'a'",
        ),
        (
            "warmup.seed=-1",
            "warmup.seed (--seed): expected a whole number of at least 0 and below 4,294,967,296",
        ),
        (
            "warmup.seed=4294967296",
            "expected a whole number of at least 0 and below 4,294,967,296, found 4294967296",
        ),
        (
            "random.seed=-5",
            "random.seed (--seed): expected a whole number of at least 0 and below 4,294,967,296",
        ),
        (
            "less.seed=-5",
            "less.seed (--seed): expected a whole number of at least 0 and below 4,294,967,296",
        ),
        ("data.targets={" + "x" * 300 + ": t.jsonl}", "100 bytes at most"),
        ("model.name=" + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("model.name=" + "x: {" * 3000 + "}" * 3000, "cannot read the value of"),
        (
            "lora.rank=" + "x" * 99999,
            "lora.rank: expected a whole number of at least 1 and at most 2,147,483,647, found 'xx",
        ),
        ("policy.budget=" + "9" * 5000, "cannot read the value of"),
        ("policy.budget='" + "9" * 5000 + "'", "expected a share (5%)"),
        ("data.pool=[\udcff]", "data.pool"),
        ("x" * 9999 + ".y=1", "unknown setting"),
        ("policy.source_cap=1e999999999999%", "expected a share above 0%"),
        ('data.template="a\\0b"', "has a NUL character in it"),
        (
            "lora.rank=1000000000000000000000000000000",
            "expected a whole number of at least 1 and at most 2,147,483,647, found 1",
        ),
        (
            "warmup.epochs=100000000000000000000000000",
            "expected a whole number of at least 1 and at most 2,147,483,647, found 1",
        ),
        (
            "warmup.batch_size=10000000000000000000000",
            "expected a whole number of at least 1 and at most 2,147,483,647, found 1",
        ),
        ("gist.norm_power=.inf", "gist.norm_power: expected a number of at least 0, found inf"),
        ("lora.alpha=.nan", "lora.alpha: expected a number above 0, found nan"),
    ],
    ids=lambda text: text[:30].encode(errors="replace").decode(),
)
def test_settings_of_any_kind_are_told(assignment: str, message: str) -> None:
    given = {"model": {"name": "m"}, "data": {"pool": "p", "targets": {"t": "t"}}}
    with pytest.raises(ConfigError) as error:
        Config.build(gradsift.config.merge(given, parse_assignment(assignment)))
    assert message in str(error.value)
    assert len(str(error.value)) < 20_000


def test_a_configuration_nested_thousands_deep_is_told(tmp_path: Path) -> None:
    for text in ("a: " + "[" * 5000 + "]" * 5000, "- " * 9999):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"cannot read the configuration .*c\.yaml: nested"):
            read_yaml(tmp_path / "c.yaml")


def test_a_share_of_almost_nothing_is_one_example(
    base: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    assert str(Budget.parse("0.0000001%")) == "0.0000001%"
    config = configure(
        base, write("pool.jsonl", pool_rows[:20]), {"t": write("t.jsonl", pool_rows[20:23])},
        method="length", policy={"budget": "0.0000001%"},
    )  # fmt: skip
    assert len(run(config, tmp_path / "run").selections["t"].picks) == 1
    assert Config.build(read_yaml(tmp_path / "run/config.yaml")) == config


def test_a_pool_without_a_word_is_told_by_bm25(base: Path, write: Write, tmp_path: Path) -> None:
    dots = write("pool.jsonl", [{"prompt": "? !", "completion": "the ..."}] * 5)
    words = write("t.jsonl", [{"prompt": "many words", "completion": "here"}] * 3)
    config = configure(base, dots, {"t": words}, method="bm25", policy={"budget": "1"})
    with pytest.raises(DataError, match=r"the pool has no word that BM25 could look for .*another"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--output-dir", "FILE"], "Not a directory"),
        (["select", "--output-dir", "FILE"], "missing setting"),
        (["explain", "FILE", "x"], "is not a gradsift run"),
        (["report", "FILE/deeper"], "is not a gradsift run"),
        (["select", "--config", "LOOP", "--output-dir", "x"], "cannot read the configuration"),
        (["select", "--model", "MODEL", "--pool", "POOL", "--target", "POOL", "--output-dir",
          "x" * 300], "File name too long"),
        (["select", "--model", "MODEL", "--pool", "POOL", "--target", "POOL", "--output-dir",
          "bad\udcff"], "is not UTF-8"),
        (["select", "--model", "MODEL", "--pool", "bad\udcff.jsonl", "--target", "POOL",
          "--output-dir", "x"], "data.pool"),
        (["select", "--model", "MODEL", "--pool", "x" * 300 + ".jsonl", "--target", "POOL",
          "--output-dir", "x"], "File name too long"),
        (["select", "--model", "MODEL", "--pool", "bad*.jsonl", "--target", "POOL",
          "--output-dir", "x"], "is not UTF-8; rename the file"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)  # fmt: skip
def test_places_that_are_none_are_told(
    base: Path, write: Write, pool_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "LOOP").symlink_to(tmp_path / "LOOP")
    (tmp_path / "bad\udcff1.jsonl").write_text(LINE)
    places = {"MODEL": str(base), "POOL": str(write("pool.jsonl", pool_rows[:20]))}
    given = [places.get(argument, argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["gradsift", *given])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured.err
    assert message in captured.err


def test_what_the_operating_system_refuses_is_told() -> None:
    def fail(*arguments: Any) -> None:
        with translate_os_errors():
            raise OSError(*arguments)

    with pytest.raises(RunError, match=r"cannot use '/x/y': Permission denied"):
        fail(13, "Permission denied", "/x/y")
    with pytest.raises(RunError, match=r"cannot use '/x/y': the disk is full; make room: what is"):
        fail(28, "No space left on device", "/x/y")
    with pytest.raises(RunError, match=r"the operating system refuses: Too many open files"):
        fail(24, "Too many open files")
    with pytest.raises(BrokenPipeError), translate_os_errors():
        raise BrokenPipeError(32, "Broken pipe")


def test_a_log_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    nowhere, full = (LogFile(tmp_path / name, delay=True) for name in ("none/log.txt", "log.txt"))
    full.stream = Full()  # type: ignore[assignment]
    record = logging.LogRecord("gradsift", logging.INFO, "", 0, "a line", (), None)
    for handler in (nowhere, full):
        for _ in range(3):
            handler.handle(record)
        assert capsys.readouterr().err == f"gradsift: cannot write {handler.baseFilename}\n"


def test_seeds_at_their_ends_work(
    base: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    config = configure(
        base, write("pool.jsonl", pool_rows[:20]), {"t": write("t.jsonl", pool_rows[20:23])},
        warmup={"seed": 2**32 - 1}, random={"seed": 2**32 - 1}, lora={"target_modules": ["q_proj"]},
    )  # fmt: skip
    scores = run(config, tmp_path / "run").scores()["t/score"].to_numpy()
    assert np.isfinite(scores).all()
    run(config.model_copy(update={"method": "random"}), tmp_path / "run")


def test_a_small_disk_is_told_whoever_writes(tmp_path: Path, base: Path, adapter: Path) -> None:
    """PEFT's own writer, which fails in words of safetensors, and a disk without inodes."""
    model = load_adapter(load_base(ModelConfig(name=str(base), device="cpu")), adapter)
    mount = tmp_path / "disk"
    mount.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=8k,nr_inodes=4", "none", str(mount)]
    if subprocess.run(small, check=False, capture_output=True).returncode:
        pytest.skip("no small file system can be mounted here (not root)")
    try:
        with pytest.raises(RunError, match="the disk is full: cannot write"):
            save_adapter(model, mount / "adapter")
        shutil.rmtree(mount / "adapter")
        for number in range(3):
            (mount / f"{number}").touch()
        with (
            pytest.raises(RunError, match=r"cannot write to the run folder .*No space left"),
            locked_run(mount / "run"),
        ):
            pass
    finally:
        subprocess.run(["umount", str(mount)], check=True)

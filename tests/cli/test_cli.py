"""The command line as a user meets it: flags, exit codes, messages, explanations."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gradsift
from conftest import Write
from gradsift.cli import main
from gradsift.errors import ConfigError, DataError, RunError
from gradsift.selection.explanation import explain

Rows = list[dict[str, Any]]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["gradsift", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_select_and_explain(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    assert call(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "mine: 6 picks of 90 by gist" in out
    assert "1 unusable rows" in out
    assert (tmp_path / "run" / "log.txt").read_text().count("coordinates/mine: ") == 1
    lines = (tmp_path / "run" / "selected" / "mine.jsonl").read_text().splitlines()
    first = json.loads(lines[0])["id"]
    assert call(monkeypatch, "explain", tmp_path / "run", first) == 0
    out = capsys.readouterr().out
    assert "for mine, by gist: picked as number 1 of 6, for " in out
    assert "number 1 of 90" in out
    [explanation] = explain(tmp_path / "run", first)
    assert explanation.position == 1
    assert explanation.score == pytest.approx(explanation.nearest[0].alignment, abs=1e-6)
    assert explanation.nearest[0].alignment >= explanation.nearest[1].alignment
    last = gradsift.run(gradsift.Config.build(_config(tmp_path)), tmp_path / "run").scores()
    worst = min(zip(last["mine/score"].to_pylist(), last["id"].to_pylist(), strict=True))[1]
    assert "not picked: the budget was spent" in explain(tmp_path / "run", worst)[0].text()
    table = (tmp_path / "run/scores/gist.parquet").read_bytes()
    (tmp_path / "run/scores/gist.parquet").write_bytes(table + b"x")
    with pytest.raises(RunError, match=r"scores/gist\.parquet is damaged; run `gradsift select`"):
        explain(tmp_path / "run", worst)
    (tmp_path / "run/scores/gist.parquet").write_bytes(table)
    with pytest.raises(DataError, match=r"the pool of .* has no example 'nobody'"):
        explain(tmp_path / "run", "nobody")
    assert call(monkeypatch, "explain", tmp_path, "x") == 2
    assert "is not a gradsift run" in capsys.readouterr().err


def _config(tmp_path: Path) -> dict[str, Any]:
    from gradsift.sections import read_yaml

    return read_yaml(tmp_path / "run" / "config.yaml")


def test_evaluate_says_which_methods_beat_random(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    write: Write, pool_rows: Rows, tmp_path: Path,
) -> None:  # fmt: skip
    assert call(monkeypatch, *arguments, "--method", "length") == 0
    test = write("test.jsonl", [row | {"id": f"{row['id']}-x"} for row in pool_rows[:4]])
    again = [
        "evaluate", tmp_path / "run", "--test", f"mine={test}", "--method", "length",
        "--set", "fine_tuning.steps=1", "--set", "fine_tuning.batch_size=4",
        "--set", "lora=1",
    ]  # fmt: skip
    assert call(monkeypatch, *again) == 2
    assert "unknown setting 'lora' (known: tests, methods, " in capsys.readouterr().err
    assert call(monkeypatch, *again[:-2]) == 0
    out = capsys.readouterr().out
    assert "mine, 6: " in out
    assert "report.md" in out
    assert call(monkeypatch, *again[:-2], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in found["rows"]][:2] == ["base", "random"]
    assert found["verdicts"]
    config = tmp_path / "run/evaluation/config.yaml"
    assert call(monkeypatch, "evaluate", tmp_path / "run", "--config", config, "--seeds", "3") == 0
    capsys.readouterr()
    assert call(monkeypatch, "evaluate", tmp_path / "run") == 2
    assert "missing setting 'tests': give --test NAME=FILE" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", tmp_path, "--test", f"mine={test}") == 2
    assert "is not a gradsift run" in capsys.readouterr().err


def test_refusals_are_explained(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, pool_rows: Rows, write: Write,
    tmp_path: Path,
) -> None:  # fmt: skip
    copied = pool_rows[1] | {"id": "copied"}
    target = write("copy.jsonl", [copied])
    extra = ["--target", f"copy={target}", "--set", "policy.decontaminate=exact"]
    assert call(monkeypatch, *arguments, *extra) == 0
    by_target = {e.target: e.verdict for e in explain(tmp_path / "run", pool_rows[1]["id"])}
    assert by_target["copy"] == "refused: repeats the target copied"


def test_an_unfinished_run_is_not_explained(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"model: {{name: {base}}}\ndata: {{pool: p.jsonl, targets: {{t: t.jsonl}}}}\n"
    )
    with pytest.raises(RunError, match=r"has not finished; run `gradsift select` with it again"):
        explain(tmp_path, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "warmup.learning_rat=1"], "did you mean 'warmup.learning_rate'?"),
        (["--budget", "0"], "a budget is above 0 and at most the whole pool, found '0'"),
        (
            ["--budget", "1000"],
            "a budget of 1000 examples, but the pool holds 91 rows; ask for less",
        ),
        (["--pool", "nowhere.jsonl"], "no such file: 'nowhere.jsonl'"),
        (["--warmup", "none"], "give an adapter or mode 'none', not both"),
        (["--adapter", "/nowhere"], "no such adapter folder: '/nowhere'"),
        (["--set", "model.device=nonsense"], "cannot use the device 'nonsense'"),
        (["--model", "./nowhere"], "no such folder: './nowhere'"),
        (["--strict"], "not valid JSON"),
        (["--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_a_user_can_mend_exits_with_2(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: list[str], message: str,
) -> None:  # fmt: skip
    assert call(monkeypatch, *arguments, *change) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--budget", "1000"], "but the pool holds 91 rows"),
        (["--budget", "0.05"], "did you mean 5%?"),
        (["--method", "gits"], "did you mean 'gist'?"),
        (["--method", "embed"], "needs sentence-transformers: pip install 'gradsift[embed]'"),
        (["--set", "model.quantization=4bit"], "bitsandbytes: pip install 'gradsift[quantized]'"),
        (["--engine", "ray"], "--engine ray needs ray: pip install 'gradsift[ray]'"),
        (["--method", "length", "--set", "policy.strategy=round-robin"], "use policy.strategy=top"),
        (["--target", "other=nowhere.jsonl"], "no such file: 'nowhere.jsonl'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_can_be_known_is_told_before_the_pool_is_encoded(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, change: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("gradsift.errors.find_spec", lambda name: None)
    assert call(monkeypatch, *arguments, *change) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/data/pool.parquet").exists()


def test_missing_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "select", "--output-dir", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "missing setting 'model': give --model" in err
    assert "missing setting 'data': give --pool and --target" in err


def test_a_target_without_a_name_has_that_of_its_file() -> None:
    from gradsift.cli.options import parse_targets

    given = ["a/dev.jsonl", "x=b.jsonl", "x=c.jsonl"]
    assert parse_targets(given) == {"dev": ["a/dev.jsonl"], "x": ["b.jsonl", "c.jsonl"]}
    for twice in (["a/dev.jsonl", "b/dev.jsonl"], ["dev=a/dev.jsonl", "b/dev.jsonl"]):
        with pytest.raises(ConfigError, match=r"would be one target 'dev'; give each a name"):
            parse_targets(twice)


def test_plan_takes_the_arguments_of_select(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", *arguments[1:], "--memory", "1GiB") == 0
    out = capsys.readouterr().out
    for text in ("90 examples", "pool pass", "ranks about: mine 7", "host memory: ", "disk: "):
        assert text in out
    assert "device memory" not in out
    assert call(monkeypatch, "plan", *arguments[1:], "--method", "length") == 0
    out = capsys.readouterr().out
    assert "length gives the base model nothing to do: the encoding is forecast" in out
    assert "ranks" not in out
    assert call(monkeypatch, "plan", *arguments[1:], "--memory", "1KiB") == 2
    assert "more than the 9.54e-07 GiB of engine.memory (--memory)" in capsys.readouterr().err
    assert call(monkeypatch, "plan", *arguments[1:], "--memory", "much") == 2
    assert "engine.memory" in capsys.readouterr().err


def test_flags_of_ray_without_ray_are_refused(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments, "--workers", 2) == 2
    assert "give --engine ray as well" in capsys.readouterr().err
    embed = ["--method", "embed", "--engine", "ray"]
    monkeypatch.setattr("gradsift.errors.find_spec", lambda name: True)
    monkeypatch.setattr("gradsift.methods.embed.identity", lambda name: name)
    assert call(monkeypatch, *arguments, *embed) == 2
    assert "method=embed runs in one process alone" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_time() -> None:
    code = (
        "import sys; sys.argv = ['gradsift', '--help']; from gradsift.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.6, seconds  # 0.15 s alone; the tests share the machine


def test_a_target_without_a_name_in_python_is_told() -> None:
    code = (  # in a process of its own: here the type would be refused before we can
        "import gradsift\n"
        "for target in (['t.jsonl', 'u.jsonl'], 3):\n"
        "    try: gradsift.select(model='m', pool='p', target=target, output_dir='r')\n"
        "    except gradsift.GradsiftError as error: print(error)"
    )
    files, number = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert files.startswith("data.targets (--target NAME=FILE): expected a name for each target")
    assert number == (
        "target: expected paths, a datasets.Dataset, a list of dicts, or a table of pandas or "
        "Arrow, found int: 3"
    )


def test_python_api(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, tmp_path: Path
) -> None:
    result = gradsift.select(
        model=str(base),
        pool=str(write("pool.jsonl", pool_rows)),
        target={"t": str(write("t.jsonl", pool_rows[:3]))},
        budget="4",
        output_dir=tmp_path / "run",
        settings={"warmup": {"adapter": str(adapter)}, "model": {"device": "cpu"}},
    )
    picks = result.selections["t"].picks
    assert isinstance(result, gradsift.RunResult)
    assert len(picks) == 4
    assert not {0, 1, 2} & set(picks["row"].to_pylist())  # they are the target itself
    assert set(result.selections["t"].refused["reason"].to_pylist()) == {"repeats the target"}

"""What the verbs print: tables or one JSON document, more or less beside it, and the policy."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.test_cli import call
from gradsift.cli import output
from gradsift.cli.options import (
    _keys_of_a_run,
    _keys_of_an_evaluation,
    _methods,
    resolve_config,
)
from gradsift.cli.settings import all_settings
from gradsift.config import Config
from gradsift.geometry.config import GeometryConfig
from gradsift.methods.registry import METHODS

HOME = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def call_json(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *given: object) -> Any:
    """Run a verb with `--json`, and return the one document that is on standard output."""
    assert call(monkeypatch, *given, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def selected(
    arguments: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
) -> Path:
    """A run folder with two selections, made on the command line."""
    assert call(monkeypatch, *arguments) == 0
    config = tmp_path / "run/config.yaml"
    again = ["select", "--config", config, "--output-dir", tmp_path / "run"]
    assert call(monkeypatch, *again, "--budget", "3", "--name", "tight") == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_verbs_print_one_json_document(
    selected: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    again = ["select", "--config", selected / "config.yaml", "--output-dir", selected]
    found = call_json(monkeypatch, capsys, *again, "--budget", "6")
    mine = found["selections"]["mine"]
    assert (found["method"], found["policy"]["budget"], found["num_pool"]) == ("gist", "6", 90)
    assert mine["num_picks"] == sum(source["num_picks"] for source in mine["sources"]) == 6
    picked = [json.loads(line)["id"] for line in Path(mine["messages"]).read_text().splitlines()]
    assert Path(found["report"]).exists()

    listed = call_json(monkeypatch, capsys, "picks", selected)["selections"]
    assert [(one["name"], one["num_picks"]) for one in listed] == [(None, 6), ("tight", 3)]
    assert listed[0]["overlap"] == {"tight": 0.5}
    assert listed[1]["overlap"] == {"": 0.5}

    [explained] = call_json(monkeypatch, capsys, "explain", selected, picked[0])
    assert (explained["id"], explained["position"]) == (picked[0], 1)
    assert call_json(monkeypatch, capsys, "report", selected) == {
        "report": f"{selected}/report.html"
    }
    settings = call_json(monkeypatch, capsys, "settings", "geometry")
    assert [one["key"] for one in settings["geometry"]] == [*GeometryConfig.model_fields]


@pytest.mark.slow
def test_geometry_of_one_target_keeps_that_of_the_others(
    arguments: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
) -> None:
    other = ["--target", f"other={tmp_path / 't.jsonl'}"]
    assert call(monkeypatch, *arguments, *other) == 0
    capsys.readouterr()
    measure = ["geometry", tmp_path / "run", "--examples", "3", "--eigenvectors", "2",
               "--probes", "3", "--seed", "1"]  # fmt: skip
    found = call_json(monkeypatch, capsys, *measure, "--target", "mine")
    assert [*found["targets"]] == ["mine"]
    assert len(found["targets"]["mine"]["captured"]) == 2
    assert [*json.loads(Path(found["numbers"]).read_text())] == ["mine"]
    found = call_json(monkeypatch, capsys, *measure, "--target", "other")
    assert [*found["targets"]] == ["mine", "other"]
    assert call(monkeypatch, *measure, "--target", "mine2") == 2
    assert "no target 'mine2'; did you mean 'mine'? (its own: mine, other)" in (
        capsys.readouterr().err
    )
    too_many = [*measure[:4], "--eigenvectors", "2000000000", "--target", "mine"]
    assert call(monkeypatch, *too_many) == 2
    assert "asked for 2,000,000,000 eigenvectors of a Hessian over" in capsys.readouterr().err


def test_plan_prints_one_json_document(
    arguments: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    found = call_json(monkeypatch, capsys, "plan", *arguments[1:])
    assert found["num_pool"] == 90
    assert found["seconds"]["pool pass"] > 0


def test_quiet_and_verbose(
    selected: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    again = ["select", "--config", selected / "config.yaml", "--output-dir", selected]
    assert call(monkeypatch, *again, "-q") == 0
    quiet = capsys.readouterr()
    assert "picks of 90 by gist" in quiet.out
    assert "already done" not in quiet.err
    assert call(monkeypatch, *again, "-v") == 0
    assert " INFO data/pool: already done" in capsys.readouterr().err
    assert call(monkeypatch, "explain", selected, "nobody", "-v") == 2
    assert "Traceback" in capsys.readouterr().err
    assert call(monkeypatch, "explain", selected, "nobody") == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.startswith("gradsift: the pool of ")
    assert "already done" in (selected / "log.txt").read_text()


def test_the_policy_in_force_is_printed_with_what_the_folder_decided(
    arguments: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
) -> None:
    cap = ["--set", "policy.source_cap=50%", "--set", "policy.strategy=round-robin"]
    assert call(monkeypatch, *arguments, *cap) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "policy: 6 examples; round-robin: each target example picks in turn; at most 50%" in out
    assert "(from" not in out
    config = tmp_path / "run/config.yaml"
    again = ["select", "--config", config, "--output-dir", tmp_path / "run", "--budget", "4"]
    assert call(monkeypatch, *again) == 0
    out = "".join(capsys.readouterr().out.split("\n"))
    assert "policy: 4 examples; round-robin" in out
    for words in ("picks in turn", "at most 50% from any one source", "target examples are kept"):
        assert f"{words} (from {config})".replace(" ", "") in out.replace(" ", "")
    assert f"repeated picks are refused (from {config})" not in out  # as it is by default
    found = call_json(monkeypatch, capsys, *again)
    assert found["policy_from_config"] == ["decontaminate", "source_cap", "strategy"]


def test_settings_said_with_another_are_marked_with_it(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    more = ["--set", "policy.duplicates=near", "--set", "policy.similarity=0.5"]
    assert call(monkeypatch, *arguments, *more) == 0
    capsys.readouterr()
    config = tmp_path / "run/config.yaml"
    again = ["select", "--config", config, "--output-dir", tmp_path / "run"]
    assert call(monkeypatch, *again, "--set", "policy.duplicates=near") == 0
    out = "".join(capsys.readouterr().out.split())
    assert f"(Jaccardsimilarityof0.5ormore)(from{config})" in out


def test_the_shell_completes_settings_and_methods() -> None:
    assert [key for key, _ in _keys_of_a_run("warmup.l")] == ["warmup.learning_rate="]
    assert [key for key, _ in _keys_of_an_evaluation("fine_tuning.s")] == ["fine_tuning.steps="]
    assert _methods() == [*METHODS]


def test_a_name_is_not_taken_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {name: m}\ndata: {pool: p, targets: {t: t}}\npolicy: {name: tight}\n")
    assert resolve_config(file, {}, [])[0].policy.name is None
    assert resolve_config(file, {"policy": {"name": "wide"}}, [])[0].policy.name == "wide"
    assert resolve_config(file, {}, ["policy.name=wide"])[0].policy.name == "wide"


def test_one_seed_is_that_of_all_that_is_drawn(
    arguments: list[object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    assert call(monkeypatch, *arguments, "--method", "random", "--seed", "7") == 0
    config = (tmp_path / "run/config.yaml").read_text()
    assert config.count("seed: 7") == 6
    assert "seed: 0" not in config


def test_every_setting_is_described() -> None:
    sections = all_settings()
    for name, settings in sections.items():
        for one in settings:
            assert one.description, one.key
            assert len(one.description) < 100, one.key
        assert len({one.key for one in settings}) == len(settings), name
    keys = {one.key for settings in sections.values() for one in settings}
    assert {"lora.rank", "policy.source_cap", "fine_tuning.steps", "lds.subsets"} <= keys
    papers = {one.key: one.paper for one in sections["lora"]}
    assert papers["lora.rank"] == "128"
    assert set(Config.model_fields) <= {*sections, "method"}


def test_the_page_of_settings_is_current() -> None:
    made = runpy.run_path(str(HOME / "docs/settings.py"))
    assert made["PAGE"].read_text("utf-8") == made["render"](), "run python docs/settings.py"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["select", "--output-dir", ""], "expected the path or URL of a run folder, found nothing"),
        (["settings", "warmpu"], "no section 'warmpu'; did you mean 'warmup'?"),
        (["picks", "nowhere"], "nowhere is not a gradsift run"),
    ],
)
def test_what_is_wrong_is_said_plainly(
    wanted: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture,
    arguments: list[object],
) -> None:  # fmt: skip
    more = arguments[1:9] if wanted[0] == "select" else []
    assert call(monkeypatch, *wanted, *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_id_or_test_is_told_before_torch_is_loaded(selected: Path) -> None:
    for given, message in (
        (["explain", selected, "nobody"], "has no example 'nobody'"),
        (["evaluate", selected, "--test", "mien=x"], "'mien', which is no target of this run; did "
         "you mean 'mine'? (its targets: mine)"),
        (["evaluate", selected, "--test", "mine=x"], "no such file: 'x'"),
        (["evaluate", selected, "--test", "mine=x", "--method", "gits"], "gits"),
        (["geometry", selected, "--target", "mien"], "did you mean 'mine'?"),
    ):  # fmt: skip
        code = (
            f"import sys; sys.argv = {['gradsift', *map(str, given)]}\n"
            "from gradsift.cli import main\n"
            "try: main()\n"
            "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "2 False", done.stderr
        assert message in done.stderr


def test_report_advises_no_flag_that_it_lacks(
    selected: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    config = selected / "config.yaml"
    pool = tmp_path / "pool.jsonl"
    pool.write_text(pool.read_text().splitlines()[0] + "\n")
    assert call(monkeypatch, "report", selected) == 2
    err = capsys.readouterr().err
    assert "the content of " in err
    assert f"`gradsift select --config {config} --output-dir {selected} --overwrite`" in err
    assert err.count("--overwrite") == 1
    assert call(monkeypatch, "select", "--config", config, "--output-dir", selected) == 2
    assert "use another --output-dir, or --overwrite to do it again" in capsys.readouterr().err


def test_values_become_plain_json() -> None:
    plain = output._plain({1: (float("nan"), Path("a"), GeometryConfig.__name__), "x": None})
    assert plain == {"1": [None, "a", "GeometryConfig"], "x": None}

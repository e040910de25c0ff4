"""`make gpu` without a GPU: every step is written down, cut off in time, and done once."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

HOME = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(HOME / "benchmarks" / "gpu.py"))


def read(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [(entry["step"], entry["status"]) for entry in map(json.loads, lines) if "step" in entry]


def test_a_step_that_fails_or_takes_too_long_stops_no_other(
    script: dict[str, Any], tmp_path: Path
) -> None:
    step, late = script["Step"], tmp_path / "late"
    writes = f"import time; time.sleep(1.5); open({str(late)!r}, 'w')"
    begins_another = (
        "import subprocess, sys, time; print('begun', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {writes!r}]); time.sleep(9)"
    )
    steps = [
        step("broken", 9, ("-c", "print('why'); raise SystemExit(3)")),
        step("endless", 0.8, ("-c", begins_another)),
        step("fine", 9, ("-c", "print('all is well')")),
        step("too late", 99, ("-c", "print('never')")),
    ]
    started = time.monotonic()
    assert not script["run_steps"](sys.executable, steps, tmp_path, 15.0, {**os.environ})
    assert time.monotonic() - started < 8
    assert read(tmp_path) == [
        ("broken", "failed"), ("endless", "timed out"), ("fine", "passed"),
        ("too late", "not begun"),
    ]  # fmt: skip
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"=== broken.*\nwhy\n", log)
    assert "begun" in log
    time.sleep(1.5)
    assert not late.exists()  # what a step began ends with it


MACHINE: dict[str, object] = {"on": "cuda", "revision": "a", "gpus": [["H100", 80, 132]]}


def test_steps_that_passed_here_are_not_done_again(script: dict[str, Any], tmp_path: Path) -> None:
    results, (write_down, finished) = tmp_path / "r", (script["write_down"], script["finished"])
    assert finished(results, MACHINE) == set()
    write_down(results, machine=MACHINE)
    for status in ("passed", "failed", "skipped", "timed out", "not begun"):
        write_down(results, step=status, status=status)
    write_down(results, step="now failed", status="passed")
    write_down(results, step="now failed", status="failed")
    with results.open("a") as file:
        file.write('{"step": "cut sh')  # by the end of a lease
    write_down(results, step="after it", status="passed")
    assert finished(results, MACHINE) == {"passed", "after it"}
    for change in ({"revision": "b"}, {"gpus": [["H200", 141, 132]]}, {"on": "cpu"}):
        other = MACHINE | change
        assert finished(results, other) == set()
        write_down(results, machine=other)
        write_down(results, step="elsewhere", status="passed")
        assert finished(results, other) == {"elsewhere"}
    assert finished(results, MACHINE) == {"passed", "after it"}


def test_a_step_of_which_all_was_skipped_has_not_passed(
    script: dict[str, Any], tmp_path: Path
) -> None:
    reason = "SKIPPED [2] tests/x.py:3: two GPUs are needed"
    steps = [
        script["Step"](name, 9, ("-c", f"print({reason!r}); print({last!r})"))
        for name, last in (("all", "== 2 skipped in 1s =="), ("some", "== 1 passed, 2 skipped =="))
    ]
    script["write_down"](tmp_path / "results.jsonl", machine=MACHINE)
    assert script["run_steps"](sys.executable, steps, tmp_path, 30.0, {**os.environ})
    assert read(tmp_path) == [("all", "skipped"), ("some", "passed")]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines[1:]] == [[reason], [reason]]
    assert script["finished"](tmp_path / "results.jsonl", MACHINE) == {"some"}


def test_a_step_ends_with_the_script(tmp_path: Path) -> None:
    step = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import os, pathlib, runpy, signal, sys\n"
        "script = runpy.run_path('benchmarks/gpu.py')\n"
        "signal.signal(signal.SIGTERM, script['end_by_exception'])\n"
        f"step = script['Step']('long', 60, ('-c', {step!r}))\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "script['run_steps'](sys.executable, [step], folder, 60, {**os.environ})\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=HOME) as process:
        log, number = tmp_path / "log.txt", None
        while number is None:
            assert process.poll() is None
            time.sleep(0.05)
            text = log.read_text() if log.exists() else ""
            number = re.search(r"^(\d+)$", text, re.MULTILINE)
        process.terminate()
        assert process.wait(9) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(number[1]), 0)


def test_a_module_in_a_wheel_is_found(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "spot-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_on_the_spot.py", "import a_module_that_is_missing\n")
    find = script["find_python"]
    monkeypatch.setitem(find.__globals__, "NEEDED", ("made_on_the_spot", "gradsift"))

    def found(name: str) -> dict[str, Any]:
        script["unpack_wheels"](tmp_path / "wheels", tmp_path / name)
        return find(script["make_environment"](tmp_path / name, tmp_path / "r", "cpu"), "cpu")

    # it is really imported: what it needs is missed too
    with pytest.raises(SystemExit, match=r"made_on_the_spot .*named 'a_module_that_is_missing'"):
        found("one")
    with zipfile.ZipFile(tmp_path / "wheels" / "missing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_module_that_is_missing/__init__.py", "")
    assert found("two")["missing"] == []


def test_what_never_answers_is_not_waited_for(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = script["find_python"].__globals__
    monkeypatch.setitem(names, "PATIENCE", 0.4)
    assert "timed out" in script["ask"](sys.executable, "-c", "import time; time.sleep(9)")
    assert "No such file" in script["ask"]("a-command-that-is-missing")
    monkeypatch.setitem(names, "PROBE", "import time; time.sleep(9)")
    with pytest.raises(SystemExit, match="has not imported them after"):
        script["find_python"]({**os.environ}, "cpu")


@pytest.mark.slow
def test_without_a_gpu_it_says_what_each_python_lacks(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/gpu.py", "--folder", str(tmp_path)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, cwd=HOME
    )
    assert done.returncode == 1
    assert "no Python here can run this:" in done.stderr
    assert re.search(r"PyTorch .* sees no CUDA device", done.stderr)


def test_steps_name_tests_that_are_there(script: dict[str, Any], tmp_path: Path) -> None:
    for on in ("cuda", "cpu"):
        steps = script["plan_steps"](tmp_path, tmp_path / "r", on)
        named = {part for step in steps for part in step.command if part.endswith(".py")}
        assert all((HOME / part).exists() for part in named)
        assert {f"tests/gpu/{p.name}" for p in (HOME / "tests/gpu").glob("test_*.py")} <= named
        assert len({step.name for step in steps}) == len(steps)


BARE = [
    *("torch", "transformers", "peft", "accelerate", "safetensors", "typer", "rich", "pyarrow"),
    "numpy",
]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names: list[str]) -> set[str]:
    """Return these distributions and all that they require."""
    todo, found = [*names], set[str]()
    while todo:
        if (name := plain(todo.pop())) in found:
            continue
        found.add(name)
        needed = map(Requirement, requires(name) or ())
        todo += [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def carried() -> set[str]:
    """Return the wheels that docs/gpu.md says to fetch."""
    [names] = re.findall(r"-d wheels \\\n((?: {4,}.+\n)+)", (HOME / "docs/gpu.md").read_text())
    return {plain(name) for name in names.replace("\\", "").split()}


BLOCKER = """
import importlib.machinery, sys
blocked = set({blocked!r})
plain = importlib.machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in blocked else plain(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.mark.slow
def test_the_steps_need_no_more_than_the_page_says(tmp_path: Path) -> None:
    allowed = with_requirements(BARE) | carried()
    blocked = sorted(
        module
        for module, names in packages_distributions().items()
        if module != "gradsift" and not allowed & {plain(name) for name in names}
    )
    assert {"beartype", "bm25s", "ray", "hypothesis"} <= {*blocked}
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "block"), "OMP_NUM_THREADS": "1"}
    for module, works in (("hypothesis", False), ("numpy", True)):
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], check=False, env=environment,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert (done.returncode == 0) is works, module
    command = [sys.executable, "benchmarks/gpu.py", "--on", "cpu", "--folder", str(tmp_path / "r")]
    done = subprocess.run(
        [*command, "several_gpus"],
        check=False, capture_output=True, text=True, env=environment, cwd=HOME,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(tmp_path / "r") == [("several_gpus", "passed")]
    assert "3 passed" in (tmp_path / "r" / "log.txt").read_text()


def test_each_of_the_modules_asked_for_is_bare_or_carried(script: dict[str, Any]) -> None:
    bare, by_module = with_requirements(BARE), packages_distributions()
    modules = {name.partition(".")[0] for name in script["NEEDED"]} - {"gradsift"}
    wheels = {plain(name) for module in modules for name in by_module[module]} - bare
    assert wheels <= carried()
    # and these with all that they require
    assert with_requirements([*carried()]) - bare == carried() - bare

"""`make gpu` without a GPU: every step is written down, cut off in time, and done once."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import time
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
    # those that were cut short are done next time, the others are not
    assert script["finished"](tmp_path / "results.jsonl") == {"broken": "failed", "fine": "passed"}
    time.sleep(1.5)
    assert not late.exists()  # what a step began ends with it


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


def distributions(modules: tuple[str, ...]) -> set[str]:
    """Return what is installed for these modules, and all that it requires."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    by_module = packages_distributions()
    todo, found = [name for module in modules for name in by_module[module]], set[str]()
    while todo:
        if (name := plain(todo.pop())) in found:
            continue
        found.add(name)
        needed = map(Requirement, requires(name) or ())
        todo += [r.name for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


BLOCKER = """
import importlib.machinery, sys
blocked = set({blocked!r})
plain = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in blocked else plain(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.mark.slow
def test_the_steps_need_no_more_than_they_say(script: dict[str, Any], tmp_path: Path) -> None:
    allowed = distributions(script["NEEDED"])
    blocked = sorted(
        module
        for module, names in packages_distributions().items()
        if not allowed & {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    )
    assert {"beartype", "bm25s", "ray", "hypothesis"} <= {*blocked}
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(
        BLOCKER.format(blocked=[name for name in blocked if name != "gradsift"])
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "block"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu.py", "--on", "cpu", "--folder", str(tmp_path / "r")]
    done = subprocess.run(
        [*command, "several_gpus"],
        check=False, capture_output=True, text=True, env=environment, cwd=HOME,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(tmp_path / "r") == [("several_gpus", "passed")]
    log = (tmp_path / "r" / "log.txt").read_text()
    assert "1 passed" in log
    [machine] = [
        entry["machine"]
        for entry in map(json.loads, (tmp_path / "r" / "results.jsonl").read_text().splitlines())
        if "machine" in entry
    ]
    assert machine["missing"] == []

"""The code of `docs/add-a-method.md` does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import Write, configure
from gradsift.methods.registry import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"


def module_of(code: str) -> ModuleType:
    module = ModuleType("centroid")
    exec(compile(code, PAGE, "exec"), module.__dict__)
    return module


def test_the_page_adds_a_method(
    base: Path, write: Write, pool_rows: list[Any], target_rows: list[Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    method, test = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(method.splitlines()) < 40
    monkeypatch.setitem(METHODS, "centroid", module_of(method).METHOD)
    pool, target = write("pool.jsonl", pool_rows[:12]), write("t.jsonl", target_rows)
    config = configure(base, pool, {"t": target}, policy={"budget": "20%"})
    module_of(test).test_centroid_is_the_cosine_with_the_mean_of_a_task(config, tmp_path / "run")

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import Write

Rows = list[dict[str, Any]]


@pytest.fixture
def arguments(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> list[object]:
    pool, target = write("pool.jsonl", [*pool_rows, "{"]), write("t.jsonl", target_rows)
    return [
        "select", "--model", base, "--pool", pool, "--target", f"mine={target}",
        "--adapter", adapter, "--budget", "6", "--output-dir", tmp_path / "run",
        "--set", "model.device=cpu", "--set", "policy.decontaminate=none",
    ]  # fmt: skip

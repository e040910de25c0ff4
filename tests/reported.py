"""A small run with a hostile pool, for the tests of its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import configure
from gradsift.pipeline import run

HOSTILE = "<script>hacked=1</script></script><img src=x onerror='hacked=1'>"
SOURCE = "<a href='https://outside.example'>here</a>" + HOSTILE

Rows = list[dict[str, Any]]


def make_run(base: Path, pool_rows: Rows, target_rows: Rows, where: Path) -> Path:
    """Return a run of two targets, of which `u` keeps only a part of its directions."""

    def write(name: str, rows: list[Any]) -> Path:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (where / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return where / name

    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": HOSTILE}]
    evil = {"messages": turns, "id": HOSTILE, "source": SOURCE}
    pool = write("pool.jsonl", [*pool_rows, evil, evil, "{", {"messages": []}])
    targets = {"t": write("t.jsonl", [*target_rows, evil]), "u": write("u.jsonl", pool_rows[:24])}
    config = configure(
        base, pool, targets, policy={"budget": "20", "decontaminate": "exact"},
        gist={"rank": "60%"},
    )  # fmt: skip
    run(config, where / "run")
    return where / "run"

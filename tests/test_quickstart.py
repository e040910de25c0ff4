"""The notebook runs as it stands in `examples/`, and shows what is kept in it."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

MADE = Path(__file__).parents[1] / "docs/notebook.py"
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")  # processors differ in the last digits
LARGEST = 60_000  # bytes; outputs and all


def shown(notebook: Any) -> list[list[Any]]:
    """Return what each cell shows, without numbers; of a page or table that it is there."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[_kinds(output) for output in cell.outputs] for cell in cells]


def _kinds(output: Any) -> Any:
    if output.output_type == "stream":
        return output.name, NUMBER.sub("0", output.text.partition("\n")[0])
    return sorted(output.data)


@pytest.mark.slow
def test_the_notebook_runs_and_its_outputs_are_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    made = runpy.run_path(str(MADE))
    kept = nbformat.read(made["NOTEBOOK"], as_version=4)
    assert made["NOTEBOOK"].stat().st_size < LARGEST
    ran = made["execute"](tmp_path)
    assert shown(ran) == shown(kept), "run python docs/notebook.py"
    [losses] = [
        ast.literal_eval(output.data["text/plain"])
        for cell in ran.cells
        for output in cell.get("outputs", [])
        if "'random'" in output.get("data", {}).get("text/plain", "")
    ]
    assert losses["picks"] < losses["random"]
    assert (tmp_path / "runs/quickstart/report.html").is_file()

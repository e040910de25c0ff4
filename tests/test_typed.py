"""What is public is typed for those who build upon it: a script of theirs passes strict pyright."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gradsift

SOURCE = Path(__file__).parents[1] / "src"  # as where the package is installed
SCRIPT = """\
import gradsift
from gradsift import GradsiftError, RunResult, Selection

result: RunResult = gradsift.select(
    model="m", pool=[{"prompt": "a", "completion": "b"}], target="t.jsonl", output_dir="run"
)
own: Selection = result.selections["t"]
first: list[dict[str, object]] = own.rows()[:5]
count: int = own.dataset(weights="rank").num_rows
try:
    found = gradsift.evaluate("run", tests={"t": "test.jsonl"}, methods=["gist"], seeds=2)
    print(found.verdicts[0], gradsift.explain("run", "a")[0].score + 1.0, count, first)
except GradsiftError as error:
    print(error)
index: gradsift.Index = gradsift.open_index(gradsift.index("i", model="m", pool="p"))
print(index.select(target={"t": "t.jsonl"}).num_pool // 2)
"""
WRONG = "import gradsift\ngradsift.select(modle='m', target='t', output_dir='o')\n"


def pyright(folder: Path, *words: str) -> dict[str, Any]:
    """Return what pyright finds."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, *words], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_type_of_what_is_public_is_known(tmp_path: Path) -> None:
    found = pyright(tmp_path, "--verifytypes", "gradsift", "--ignoreexternal")
    objects = [getattr(gradsift, name) for name in gradsift.__all__]
    homes = {f"{own.__module__}.{own.__qualname__}" for own in objects}
    symbols = found["typeCompleteness"]["symbols"]
    public = {s["name"]: s for s in symbols if ".".join(s["name"].split(".")[:-1]) in homes}
    public |= {s["name"]: s for s in symbols if s["name"] in homes}
    assert homes <= public.keys()
    assert len(public) > 4 * len(homes)  # with their members
    unknown = [n for n, s in public.items() if s["isTypeAmbiguous"] or not s["isTypeKnown"]]
    assert not unknown


@pytest.mark.slow
def test_a_script_of_a_user_is_type_checked(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(WRONG)
    strict = {"typeCheckingMode": "strict", "pythonVersion": "3.11", "extraPaths": [str(SOURCE)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(strict))
    found = pyright(tmp_path)["generalDiagnostics"]
    errors = [(Path(own["file"]).name, own["message"]) for own in found]
    assert len(errors) == 1, errors
    assert errors[0][0] == "wrong.py"
    assert "modle" in errors[0][1]

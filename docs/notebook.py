"""Run `examples/quickstart.ipynb` in a folder of its own and keep what its cells show in it.

After a change of it, or of what it shows: `python docs/notebook.py`.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples/quickstart.ipynb"


def execute(folder: str | Path) -> nbformat.NotebookNode:
    """Return the notebook as it is after all its cells were run, in a folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, resources=resources, record_timing=False, timeout=600).execute()
    return notebook


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        nbformat.write(execute(scratch), NOTEBOOK)

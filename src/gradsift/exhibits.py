"""Figures and tables with a sentence each, as files: what a part of a run has for the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradsift.errors import RunError
from gradsift.store import write_atomically

FILE = "exhibits.json"
"""In the folder of whatever has something to show."""
_STALE = "Measured before this folder's picks or adapters were made anew, and not of those now: "


@dataclass(frozen=True)
class Exhibit:
    """A figure (Plotly's JSON) or a table, its heads the first row, and what it says in words."""

    title: str
    text: str
    figure: Mapping[str, Any] | None = None
    table: Sequence[Sequence[str]] = ()


def write_exhibits(
    folder: Path, exhibits: Mapping[str, Sequence[Exhibit]], of: Mapping[str, str]
) -> None:
    """Leave the exhibits of each target in a folder; `of` tells what each target's are about."""
    content = {
        name: {"of": of[name], "exhibits": [asdict(exhibit) for exhibit in own]}
        for name, own in exhibits.items()
    }
    text = json.dumps(content)
    sealed = {"sha256": _digest(text), "targets": text}
    write_atomically(folder / FILE, json.dumps(sealed).encode())


def read_exhibits(folder: Path, target: str, of: str) -> list[Exhibit]:
    """Return what a folder has to show of a target: nothing if there is no such thing.

    What is about something else than `of` says so in its text.

    Raises:
        RunError: If the file is not what was written.
    """
    path = folder / FILE
    if not path.exists():
        return []
    text, intact = "", False
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        text, intact = sealed["targets"], sealed["sha256"] == _digest(sealed["targets"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # as damaged as with another hash
    if not intact:
        raise RunError(
            f"{path} is damaged; run `gradsift {folder.name} {folder.parent}` again, or remove it"
        )
    content = json.loads(text).get(target)
    if content is None:
        return []
    found = [Exhibit(**exhibit) for exhibit in content["exhibits"]]
    return found if content["of"] == of else [replace(e, text=_STALE + e.text) for e in found]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def plotly_json(figure: Any) -> dict[str, Any]:
    """Return a Plotly figure as plain values, without the template that the page has of its own."""
    figure.update_layout(template="none", autosize=True)
    return json.loads(figure.to_json())

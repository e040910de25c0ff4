"""Figures with a sentence each, as files: what one part of a run leaves for the report to show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradsift.store import write_atomically

FILE = "exhibits.json"
"""In the folder of whatever has something to show."""


@dataclass(frozen=True)
class Exhibit:
    """A figure (Plotly's JSON) and what it says in plain words."""

    title: str
    text: str
    figure: Mapping[str, Any]


def write_exhibits(folder: Path, exhibits: Mapping[str, Sequence[Exhibit]]) -> None:
    """Leave the exhibits of each target in a folder."""
    content = {name: [asdict(exhibit) for exhibit in own] for name, own in exhibits.items()}
    write_atomically(folder / FILE, json.dumps(content).encode())


def read_exhibits(folder: Path, target: str) -> list[Exhibit]:
    """Return what a folder has to show of a target: nothing if there is no such thing."""
    if not (folder / FILE).exists():
        return []
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return [Exhibit(**exhibit) for exhibit in content.get(target, [])]

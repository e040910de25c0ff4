"""Figures and tables with a sentence each, as files: what a part of a run has for the report."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.folder import Run
from gradsift.runs.stage import Stage

logger = logging.getLogger(__name__)

_VERBS = {layout.EVALUATION: "evaluate", layout.GEOMETRY: "geometry"}
PARTS = tuple(_VERBS)
"""The parts of a run that may have exhibits for the report."""
_STALE = "Measured for other picks or adapters of this folder, and not for these: "


@dataclass(frozen=True)
class Exhibit:
    """A figure (Plotly's JSON) or a table, its heads the first row, and what it says in words.

    `verdict`: a sentence that belongs on top of the page. `stale`: about other picks than now.
    """

    title: str
    text: str
    figure: Mapping[str, Any] | None = None
    table: Sequence[Sequence[str]] = ()
    verdict: str = ""
    stale: bool = False


def write_exhibits(
    folder: Run, part: str, exhibits: Mapping[str, Sequence[Exhibit]], of: Mapping[str, str]
) -> None:
    """Store the exhibits of each target in a part of a run; `of` says what each's are about."""
    content = {
        name: {"of": of[name], "exhibits": [asdict(exhibit) for exhibit in own]}
        for name, own in exhibits.items()
    }
    text = json.dumps(content).encode()
    depends = {"content": hashlib.sha256(text).hexdigest()}
    stage = Stage(layout.exhibiting(part), depends, (layout.exhibits(part),), cheap=True)
    with folder.stage(stage) as todo:
        if todo:
            write_atomically(folder.path / layout.exhibits(part), text)


def exhibits_fault(folder: Run, part: str) -> str:
    """Return why the exhibits of a part of a run cannot be shown; nothing if they can, or none are.

    Says what makes them again.
    """
    name, again = layout.exhibiting(part), f"run `gradsift {_VERBS[part]} {folder.path}` again"
    if damage := folder.damage(name):
        return f"{damage}; {again}, or remove {layout.manifest(name)} too"
    if (folder.path / layout.exhibits(part)).exists() and not folder.has_manifest(name):
        return f"{folder.path / layout.exhibits(part)} has no manifest; {again}, or remove it"
    return ""


def read_exhibits(folder: Run, part: str, target: str, of: str) -> list[Exhibit]:
    """Return what a part of a run has to show of a target: nothing if there is no such thing.

    What is about something else than `of` says so in its text; what cannot be shown is named in
    the log.
    """
    if fault := exhibits_fault(folder, part):
        logger.warning("left out of the report: %s", fault)
        return []
    path = folder.path / layout.exhibits(part)
    content = json.loads(path.read_text(encoding="utf-8")).get(target) if path.exists() else None
    if content is None:
        return []
    found = [Exhibit(**exhibit) for exhibit in content["exhibits"]]
    if content["of"] == of:
        return found
    return [replace(exhibit, text=_STALE + exhibit.text, stale=True) for exhibit in found]


def plotly_json(figure: Any) -> dict[str, Any]:
    """Return a Plotly figure as plain values, without the template that the page has of its own."""
    figure.update_layout(template="none", autosize=True)
    return json.loads(figure.to_json())

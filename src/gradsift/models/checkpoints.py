"""The adapters that a warm-up left, and how much each counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.types import Checkpoint


def write_checkpoints(directory: Path, weights: Mapping[str, float]) -> None:
    """Keep the labels of a warm-up's adapters, each a folder beside, and how much each counts."""
    write_atomically(directory / layout.CHECKPOINTS, json.dumps(weights).encode())


def read_checkpoints(directory: Path) -> list[Checkpoint]:
    """Return the adapters that a warm-up left, their weights summing to 1."""
    weights = json.loads((directory / layout.CHECKPOINTS).read_text(encoding="utf-8"))
    total = sum(weights.values())
    return [Checkpoint(label, directory / label, w / total) for label, w in weights.items()]

"""Where a training is logged besides: TensorBoard or Weights & Biases, as by the HF Trainer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gradsift.executors.processes import is_first

_LONGEST_NAME = 120


@dataclass(frozen=True)
class Trackers:
    """What a training reports to, by the names of the Trainer's `report_to`; none by default.

    `folder` is for this training alone: TensorBoard's files lie there, and its name is the run's.
    """

    names: tuple[str, ...] = ()
    folder: Path = Path()

    def arguments(self, scratch: str) -> dict[str, Any]:
        """Return what the Trainer's arguments say of it; without a tracker, it has no folder."""
        if not self.names:
            return {"output_dir": scratch, "report_to": "none"}
        return {
            "output_dir": str(self.folder),
            "report_to": [*self.names],
            "run_name": self.folder.name,
        }

    def finish(self) -> None:
        """End the run, so that the next training is one of its own; TensorBoard's has ended."""
        if "wandb" in self.names and is_first():
            import_module("wandb").finish()


NOWHERE = Trackers()


def as_folder_name(text: str) -> str:
    """Return a text as it can be the name of a folder.

    >>> as_folder_name("gist for sql, seed 0")
    'gist-for-sql-seed-0'
    """
    return re.sub(r"[^\w.=-]+", "-", text).strip("-")[:_LONGEST_NAME]

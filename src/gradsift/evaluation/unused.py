"""What earlier evaluations left in a run folder that the current one does not use."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.selection.stages import RunStages

logger = logging.getLogger(__name__)


def remove_unused(folder: Run, cells: set[Path], stages: Iterable[RunStages]) -> None:
    """Remove all fine-tunings but these, and what was measured for no stage of these.

    Of what was measured, only that beside the run's own measurements is looked at.
    """
    places = {place for own in stages for place in own.inputs.places.values()}
    measured = folder.path / layout.MEASURED
    kept = {measured / Path(place).relative_to(layout.MEASURED).parts[0] for place in places}
    found = [path for path in (folder.path / layout.FINE_TUNINGS).iterdir() if path not in cells]
    found += [path for path in measured.iterdir() if path not in kept] if measured.exists() else []
    size = sum(map(_size, found))
    for path in found:
        folder.remove(path)
        manifests = folder.path / layout.MANIFESTS / path.relative_to(folder.path)
        if manifests.exists():
            folder.remove(manifests)
    logger.info(
        "%d fine-tunings or measurements that this evaluation does not use are removed (%.1f MiB)",
        len(found),
        size / 2**20,
    )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())

"""What a run left in its folder, for whoever goes on with it in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gradsift.data.encoded import EncodedSet
from gradsift.errors import translate_os_errors
from gradsift.runs import layout
from gradsift.runs.manifests import Manifests
from gradsift.runs.opening import local_folder, read_config
from gradsift.selection.picks import Selection, list_selections
from gradsift.selection.score_table import read_table


@dataclass(frozen=True, repr=False)
class RunResult:
    """What a run left in its folder: selections by target, seconds by stage.

    `peak_memory` is the largest resident size that any stage's process had reached, in bytes.

    Examples:
        >>> result = gradsift.open_run("runs/gsm8k")                         # doctest: +SKIP
        >>> result.scores(["id", "gsm8k/score"]).num_rows == result.num_pool  # doctest: +SKIP
        True
    """

    path: Path
    method: str
    selections: Mapping[str, Selection]
    num_pool: int
    num_rejected: int
    seconds: Mapping[str, float]
    peak_memory: int

    def scores(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the method's scores: one row per pool example, `T/score` and so on per target."""
        return read_table(self.path, self.method, columns)

    def __repr__(self) -> str:
        picked = ", ".join(f"{key} {len(own.picks):,}" for key, own in self.selections.items())
        rejected = f", {self.num_rejected:,} rows rejected" if self.num_rejected else ""
        return (
            f"{self.path}: {self.num_pool:,} pool examples, scored by {self.method}{rejected}\n"
            f"  picks: {picked}\n"
            f"  {self.path / layout.REPORT}"
        )

    def _repr_html_(self) -> str:
        return "".join(own._repr_html_() for own in self.selections.values())


@translate_os_errors()
def open_run(path: str | Path) -> RunResult:
    """Return what a finished run left in its folder (or URL), as `select` did.

    Of selections that have a name the key is `TARGET.NAME`.

    Examples:
        >>> gradsift.open_run("runs/gsm8k").selections["gsm8k"].dataset()    # doctest: +SKIP
        Dataset({...

    Raises:
        RunError: If it is no run, or holds no picks yet.
    """
    config, folder = read_config(path), local_folder(path, fetch=False)
    selections = {selection.key: selection for selection in list_selections(path)}
    return collect_result(folder, config.method, selections, Manifests(folder).of_all_stages())


def collect_result(
    folder: Path,
    method: str,
    selections: Mapping[str, Selection],
    facts: Mapping[str, Mapping[str, Any]],
) -> RunResult:
    """Return what a run left, given its selections and what `facts` of its folder says."""
    return RunResult(
        path=folder,
        method=method,
        selections=selections,
        num_pool=len(EncodedSet(folder / layout.encoded(layout.POOL))),
        num_rejected=(folder / layout.REJECTED).read_bytes().count(b"\n"),
        seconds={name: manifest["seconds"] for name, manifest in facts.items()},
        peak_memory=max(manifest["peak_memory_bytes"] for manifest in facts.values()),
    )

"""A stage of a run: its name, what it depends on, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gradsift.runs.hashing import digest


@dataclass(frozen=True)
class Stage:
    """A step of a run: its name, the settings it depends on, and the paths that it writes.

    `sources`: the stages whose outputs it reads. A `cheap` stage is simply done again when it
    differs; so is any that broke off, unless it `keeps_parts` from which it would have gone on.
    """

    name: str
    settings: Mapping[str, Any]
    outputs: tuple[str, ...]
    sources: tuple[Stage, ...] = ()
    cheap: bool = False
    keeps_parts: bool = False

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All that the result depends on, known before any work."""
        sources = {source.name: source.fingerprint for source in self.sources}
        return json.loads(json.dumps({**self.settings, "sources": sources}))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the inputs, by which later stages depend on this one."""
        return digest(self.inputs)[:16]

"""Which pool examples load most on a target's leading directions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gradsift.methods import gist
from gradsift.methods.job import Job
from gradsift.runs import layout

_DIRECTIONS, _EACH_SIDE = 5, 3
_AT_ONCE = 1 << 18  # pool examples


@dataclass(frozen=True)
class Direction:
    """A leading direction, its share of the variance, and the rows that load on it most.

    `loadings` are of all pool examples; `positive` and `negative` are rows, the strongest first.
    """

    number: int
    variance: float
    loadings: Float[np.ndarray, " example"]
    positive: Int[np.ndarray, " row"]
    negative: Int[np.ndarray, " row"]


def read_spectra(run: Path, target: str) -> dict[str, Any]:
    """Return the spectrum of a target's gradients at every checkpoint."""
    return json.loads((run / layout.spectrum(target)).read_text(encoding="utf-8"))


def leading_directions(job: Job, target: str) -> list[Direction]:
    """Return the first directions of a target at the last checkpoint.

    A loading is the cosine of an example's whole gradient with the direction.
    """
    label = job.checkpoints()[-1].label
    own = gist.COORDINATES.read(job, target, label)
    norms = gist.COORDINATES.norms(job, target, label)
    pieces = [slice(start, start + _AT_ONCE) for start in range(0, len(job.pool), _AT_ONCE)]
    tiny = np.finfo(np.float32).tiny
    loadings = np.concatenate(
        [own[p][:, :_DIRECTIONS] / np.maximum(norms[p], tiny)[:, None] for p in pieces]
    )
    spectrum = read_spectra(job.folder.path, target)[label]
    variances = np.array(spectrum["singular_values"]) ** 2
    tail = job.config.gist.directions == "tail"
    first = spectrum["span"] - spectrum["rank"] if tail else 0
    result = []
    for number, column in enumerate(loadings.T, start=first):
        order = np.argsort(column, kind="stable")
        share = float(variances[number] / variances.sum())
        sides = (order[::-1][:_EACH_SIDE], order[:_EACH_SIDE])
        result.append(Direction(number + 1, share, column, *sides))
    return result

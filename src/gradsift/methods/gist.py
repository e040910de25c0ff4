"""GIST: score by cosine inside the subspace of the target's gradients.

Min, Huang, Wan, Chen: Gradient Isometric Subspace Transformation, ICML 2026, arXiv 2602.18584.
Target gradients give a subspace per target; one pass over the pool projects every example's
gradient on the subspaces of all targets at once; coordinates are compared by cosine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from gradsift.config import Config
from gradsift.gradients.distinct import distinct_examples
from gradsift.gradients.subspace import Subspace, describe, fit_subspace
from gradsift.methods.base import Inputs, Method
from gradsift.methods.job import Job
from gradsift.pool.coordinates import project_pool
from gradsift.pool.examples import not_finite
from gradsift.runs.atomic import write_atomically
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, Rows, RowStore, View
from gradsift.types import Checkpoint

logger = logging.getLogger(__name__)


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up, the subspace of each target, and the coordinates of the pool."""
    warmup = inputs.warmup(inputs.config, "warmup")
    settings = inputs.config.gist.model_dump(include={"rank", "directions"})
    subspaces = [
        Stage(f"targets/{name}", settings, (f"targets/{name}",), (inputs.target(name), warmup))
        for name in inputs.config.data.targets
    ]
    return warmup, *subspaces, inputs.pool_pass("coordinates", warmup, *subspaces)


def measure(job: Job) -> None:
    """Leave adapters, subspaces and coordinates.

    Raises:
        NumericsError: If a gradient is not finite or the rank asked for is not there.
    """
    warmup, *subspaces, coordinates = stages(job.inputs)
    checkpoints = job.warm_up(warmup, job.config)
    for name, stage in zip(job.targets, subspaces, strict=True):
        with job.folder.stage(stage) as todo:
            if todo:
                job.call(partial(_measure_subspaces, job, name, checkpoints), job.path(stage.name))
    with job.pool_stage(coordinates, [c.label for c in checkpoints]) as todo:
        if todo:
            for checkpoint in checkpoints:
                found = {name: load_subspace(job, name, checkpoint) for name in job.targets}
                combinations = {name: subspace.combination for name, subspace in found.items()}
                project_pool(job, checkpoint, "coordinates", combinations)


def scores(job: Job) -> dict[str, Alignment]:
    """Return the cosines of coordinates, aggregated as `gist.aggregation` says."""
    aggregation = job.config.gist.aggregation
    return {name: _align(job, name, _views(job, name), aggregation) for name in job.targets}


def facts(job: Job) -> dict[str, np.ndarray]:
    """Return loss and gradient norm of every pool example at the last checkpoint."""
    last = job.checkpoints(stages(job.inputs)[0])[-1].label
    return {name: job.stored("coordinates", name, last)[:] for name in ("loss", "gradient_norm")}


def settings(config: Config) -> Mapping[str, Any]:
    """Return what the scores depend on besides the coordinates."""
    return config.gist.model_dump(include={"aggregation", "norm_power"})


METHOD = Method(scores, stages, measure, settings, facts)


def load_subspace(job: Job, name: str, checkpoint: Checkpoint) -> Subspace:
    """Return a stored subspace."""
    tensors = load_file(_subspace_file(job, name, checkpoint))
    parts = (tensors[key] for key in ("combination", "coordinates", "singular_values"))
    return Subspace(*parts, span=int(tensors["span"][0]))


def load_wider(job: Job, name: str, checkpoint: Checkpoint) -> Subspace:
    """Return the subspace of twice the rank of a stored one, or of all that the target spans."""
    own = load_subspace(job, name, checkpoint)
    gram = load_file(_subspace_file(job, name, checkpoint))["gram"]
    return fit_subspace(gram, min(2 * own.rank, own.span))


def _subspace_file(job: Job, name: str, checkpoint: Checkpoint) -> Path:
    return job.path("targets") / name / f"{checkpoint.label}.safetensors"


def variants(job: Job, name: str) -> dict[str, Alignment]:
    """Return the scores of a target as other settings would have them, from the same coordinates.

    With the first half of the directions, and with each other aggregation.
    """
    halved = [replace(v, pool=_Half(v.pool), target=_Half(v.target)[:]) for v in _views(job, name)]
    own, others = job.config.gist.aggregation, ("max", "task-mean", "mean-cosine")
    wanted: dict[str, tuple[Sequence[View], str]] = {}
    if job.config.gist.directions == "leading" and max(v.target.shape[1] for v in halved) > 1:
        wanted["half the rank"] = (halved, own)
    for other in others:
        if other != own:
            wanted[f"aggregation {other}"] = (_views(job, name), other)
    return {told: _align(job, name, views, how) for told, (views, how) in wanted.items()}


@dataclass(frozen=True)
class _Half:
    """The leading half of the directions, at least one."""

    whole: RowStore

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, rows: Rows) -> np.ndarray:
        found = self.whole[rows]
        return found[:, : max(1, found.shape[1] // 2)]


def _views(job: Job, name: str) -> list[View]:
    """Return coordinates of pool and target at every checkpoint."""
    return [
        View(
            pool=job.stored("coordinates", f"coordinates/{name}", checkpoint.label),
            target=load_subspace(job, name, checkpoint).coordinates.astype(np.float32),
            weight=checkpoint.weight,
            gradient_norms=job.stored("coordinates", "gradient_norm", checkpoint.label),
        )
        for checkpoint in job.checkpoints(stages(job.inputs)[0])
    ]


def _align(job: Job, name: str, views: Sequence[View], aggregation: str) -> Alignment:
    return Alignment(Cosines(views, job.config.gist.norm_power), job.tasks(name), aggregation)


def _measure_subspaces(job: Job, name: str, checkpoints: list[Checkpoint]) -> None:
    """Leave each checkpoint's subspace of a target, and `spectrum.json`."""
    from gradsift.gradients.gram import fitting_gram

    config, target, directory = job.config.gist, job.targets[name], job.path("targets") / name
    examples, inverse = distinct_examples(target)
    spectra = {}
    for checkpoint in checkpoints:
        model = job.models.at(checkpoint.path)
        gram = fitting_gram(model, examples, job.config.engine)[np.ix_(inverse, inverse)]
        broken = np.flatnonzero(~np.isfinite(np.diag(gram)))
        if len(broken):
            raise not_finite(f"gradient of the target {name!r}", target, broken)
        dtype = str(model.dtype).removeprefix("torch.")
        subspace = fit_subspace(gram, config.rank, dtype, config.directions)
        if subspace.rank == 1 and not config.norm_power:
            logger.warning(
                "%s has a single direction: every score is 1 or -1 and the pool's order decides; "
                "give more target examples or set gist.norm_power=1",
                name,
            )
        _save_subspace(subspace, gram, _subspace_file(job, name, checkpoint))
        spectra[checkpoint.label] = describe(subspace)
        told = (name, checkpoint.label, subspace.rank, len(target))
        logger.info("%s at %s: rank %d of %d examples", *told)
    write_atomically(directory / "spectrum.json", json.dumps(spectra, indent=1).encode())


def _save_subspace(subspace: Subspace, gram: Float[np.ndarray, "query query"], path: Path) -> None:
    tensors = {
        "gram": gram,  # any other rank can be fitted from it
        "span": np.array([subspace.span]),
        "combination": np.ascontiguousarray(subspace.combination),
        "coordinates": np.ascontiguousarray(subspace.coordinates),
        "singular_values": np.ascontiguousarray(subspace.singular_values),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_file, tensors))

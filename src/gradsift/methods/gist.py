"""GIST: score by cosine inside the subspace of the target's gradients.

Min, Huang, Wan, Chen: Gradient Isometric Subspace Transformation, ICML 2026, arXiv 2602.18584.
Target gradients give a subspace per target; one pass over the pool projects every example's
gradient on the subspaces of all targets that are new; coordinates are compared by cosine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gradsift.config import Config
from gradsift.gradients.distinct import distinct_examples
from gradsift.gradients.subspace import (
    Subspace,
    describe,
    fit_subspace,
    load_subspace,
    save_subspace,
)
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.products import Products
from gradsift.methods.work import Sizes, Work, gram_of_targets, projected, warm_up
from gradsift.pool.coordinates import Directions, by_target
from gradsift.pool.examples import not_finite
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.types import Checkpoint

logger = logging.getLogger(__name__)


COORDINATES = Products(layout.coordinates)


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up, and each target's subspace and coordinates of the pool."""
    warmup = inputs.warmup_stage
    subspaces = _subspace_stages(inputs, warmup)
    return warmup, *subspaces.values(), *_coordinate_stages(inputs, warmup, subspaces).values()


def _subspace_stages(inputs: Inputs, warmup: Stage) -> dict[str, Stage]:
    settings = inputs.config.gist.model_dump(include={"rank", "directions"})
    folders = {name: inputs.at(layout.target_folder(name)) for name in inputs.target_names}
    cheap = inputs.asks is not None  # no pass over the pool follows from it
    return {
        name: Stage(folder, settings, (folder,), (inputs.target_stage(name), warmup), cheap)
        for name, folder in folders.items()
    }


def _coordinate_stages(
    inputs: Inputs, warmup: Stage, subspaces: Mapping[str, Stage]
) -> dict[str, Stage]:
    return {name: COORDINATES.stage(inputs, name, warmup, own) for name, own in subspaces.items()}


def measure(job: Job) -> None:
    """Store adapters, subspaces and coordinates.

    Raises:
        NumericsError: If a gradient is not finite or the rank asked for is not there.
    """
    warmup = job.inputs.warmup_stage
    subspaces = _subspace_stages(job.inputs, warmup)
    checkpoints = job.warm_up(warmup)
    for name, stage in subspaces.items():
        with job.folder.stage(stage) as todo:
            if todo:
                job.call(partial(_measure_subspaces, job, name, checkpoints), job.path(stage.name))
    coordinates = _coordinate_stages(job.inputs, warmup, subspaces)
    COORDINATES.measure(job, coordinates, checkpoints, partial(_directions, job))


def scores(job: Job) -> dict[str, Alignment]:
    """Return the cosines of coordinates, aggregated as `gist.aggregation` says."""
    aggregation = job.config.gist.aggregation
    return {name: align(job, name, views(job, name), aggregation) for name in job.targets}


def settings(config: Config) -> Mapping[str, Any]:
    """Return what the scores depend on besides the coordinates."""
    return config.gist.model_dump(include={"aggregation", "norm_power"})


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return the warm-up, the Gram matrix of each target, and the pass over the pool."""
    ranks = {name: sizes.ranks.get(name, own.num_examples) for name, own in sizes.targets.items()}
    return [
        *warm_up(config.warmup, sizes),
        *(
            replace(work, kept=16 * rank + 8 * work.directions)  # combination, coordinates, Gram
            for work, rank in zip(
                gram_of_targets(config, sizes, "subspace of"), ranks.values(), strict=True
            )
        ),
        *projected(sizes.all_targets, sizes, sum(ranks.values()), config.warmup),
    ]


METHOD = Method(scores, stages, measure, settings, COORDINATES.facts, work=work, reads_index=True)


def stored_subspace(job: Job, name: str, checkpoint: Checkpoint) -> Subspace:
    """Return the subspace of a target at a checkpoint."""
    return load_subspace(job.path(layout.subspace(name, checkpoint.label)))


def views(job: Job, name: str) -> list[View]:
    """Return coordinates of pool and target at every checkpoint."""
    return [
        View(
            pool=COORDINATES.read(job, name, checkpoint.label),
            target=stored_subspace(job, name, checkpoint).coordinates.astype(np.float32),
            weight=checkpoint.weight,
            gradient_norms=COORDINATES.norms(job, name, checkpoint.label),
        )
        for checkpoint in job.checkpoints()
    ]


def align(job: Job, name: str, compared: Sequence[View], aggregation: str) -> Alignment:
    """Return the scores of a target that follow from some coordinates."""
    return Alignment(Cosines(compared, job.config.gist.norm_power), job.tasks(name), aggregation)


def _directions(job: Job, checkpoint: Checkpoint, names: Sequence[str]) -> Directions:
    """Return the bases of the subspaces of some targets at a checkpoint."""
    combinations = {name: stored_subspace(job, name, checkpoint).combination for name in names}
    return by_target(job.targets, combinations)


def _measure_subspaces(job: Job, name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Store each checkpoint's subspace of a target, and `spectrum.json`."""
    from gradsift.gradients.gram import fitting_gram
    from gradsift.models.kernels import precision_of

    config, target = job.config.gist, job.targets[name]
    examples, inverse = distinct_examples(target)
    spectra = {}
    for checkpoint in checkpoints:
        model = job.models.with_adapter(checkpoint.path)
        gram = fitting_gram(model, examples, job.config.engine)[np.ix_(inverse, inverse)]
        broken = np.flatnonzero(~np.isfinite(np.diag(gram)))
        if len(broken):
            raise not_finite(f"gradient of the target {name!r}", target, broken)
        subspace = fit_subspace(gram, config.rank, precision_of(model), config.directions)
        if subspace.rank == 1 and not config.norm_power:
            logger.warning(
                "%s has a single direction: every score is 1 or -1 and the pool's order decides; "
                "give more target examples or set gist.norm_power=1",
                name,
            )
        save_subspace(subspace, gram, job.path(layout.subspace(name, checkpoint.label)))
        spectra[checkpoint.label] = describe(subspace)
        summary = (name, checkpoint.label, subspace.rank, len(target))
        logger.info("%s at %s: rank %d of %d examples", *summary)
    content = json.dumps(spectra, indent=1).encode()
    write_atomically(job.path(layout.spectrum(name)), content)

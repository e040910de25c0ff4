"""GIST: score by cosine inside the subspace of the target's gradients.

Min, Huang, Wan, Chen: Gradient Isometric Subspace Transformation, ICML 2026, arXiv 2602.18584.
Target gradients give a subspace per target; one pass over the pool projects every example's
gradient on the subspaces of all targets at once; coordinates are compared by cosine.
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
from gradsift.methods.work import Sizes, Work, gram_of_targets, projected, warm_up
from gradsift.pool.coordinates import (
    by_target,
    coordinates_key,
    losses_and_norms,
    make_projection_measure,
)
from gradsift.pool.examples import MeasureFactory, not_finite
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.types import Checkpoint

logger = logging.getLogger(__name__)


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up, the subspace of each target, and the coordinates of the pool."""
    warmup = inputs.warmup_stage
    settings = inputs.config.gist.model_dump(include={"rank", "directions"})
    folders = {name: inputs.at(layout.target_folder(name)) for name in inputs.target_names}
    subspaces = [
        Stage(folder, settings, (folder,), (inputs.target_stage(name), warmup))
        for name, folder in folders.items()
    ]
    return warmup, *subspaces, inputs.make_pool_pass_stage(layout.COORDINATES, warmup, *subspaces)


def measure(job: Job) -> None:
    """Store adapters, subspaces and coordinates.

    Raises:
        NumericsError: If a gradient is not finite or the rank asked for is not there.
    """
    warmup, *subspaces, coordinates = stages(job.inputs)
    checkpoints = job.warm_up(warmup)
    for name, stage in zip(job.targets, subspaces, strict=True):
        with job.folder.stage(stage) as todo:
            if todo:
                job.call(partial(_measure_subspaces, job, name, checkpoints), job.path(stage.name))
    factories = {c.label: partial(_factory, job, c) for c in checkpoints}
    job.pool_pass(coordinates.name).run(coordinates, factories)


def scores(job: Job) -> dict[str, Alignment]:
    """Return the cosines of coordinates, aggregated as `gist.aggregation` says."""
    aggregation = job.config.gist.aggregation
    return {name: align(job, name, views(job, name), aggregation) for name in job.targets}


def facts(job: Job) -> dict[str, np.ndarray]:
    """Return loss and gradient norm of every pool example at the last checkpoint."""
    return losses_and_norms(job.pool_pass(layout.COORDINATES), job.checkpoints()[-1].label)


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
        *projected(sizes.all_targets, sizes.pool, sum(ranks.values()), config.warmup),
    ]


METHOD = Method(scores, stages, measure, settings, facts, work=work)


def stored_subspace(job: Job, name: str, checkpoint: Checkpoint) -> Subspace:
    """Return the subspace of a target at a checkpoint."""
    return load_subspace(job.path(layout.subspace(name, checkpoint.label)))


def views(job: Job, name: str) -> list[View]:
    """Return coordinates of pool and target at every checkpoint."""
    coordinates = job.pool_pass(layout.COORDINATES)
    return [
        View(
            pool=coordinates.read(coordinates_key(name), checkpoint.label),
            target=stored_subspace(job, name, checkpoint).coordinates.astype(np.float32),
            weight=checkpoint.weight,
            gradient_norms=coordinates.read("gradient_norm", checkpoint.label),
        )
        for checkpoint in job.checkpoints()
    ]


def align(job: Job, name: str, compared: Sequence[View], aggregation: str) -> Alignment:
    """Return the scores of a target that follow from some coordinates."""
    return Alignment(Cosines(compared, job.config.gist.norm_power), job.tasks(name), aggregation)


def _factory(job: Job, checkpoint: Checkpoint) -> MeasureFactory:
    """Return what projects on the subspaces of all targets at a checkpoint."""
    combinations = {
        name: stored_subspace(job, name, checkpoint).combination for name in job.targets
    }
    parts, widths = by_target(job.targets, combinations)
    args = (job.models, checkpoint.path, parts, widths, job.config)
    return partial(make_projection_measure, *args)


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

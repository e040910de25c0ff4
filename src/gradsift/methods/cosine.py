"""Cosine of whole gradients, without a subspace: the ablation that says what the SVD buys.

The directions of the pool pass are the target gradients themselves, at length 1.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from gradsift.config import Config
from gradsift.errors import ConfigError
from gradsift.gradients.distinct import distinct_examples
from gradsift.methods.base import Inputs, Method
from gradsift.methods.job import Job
from gradsift.pool.coordinates import project_pool
from gradsift.pool.examples import not_finite
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Table
from gradsift.types import Checkpoint

_FOLDER = "cosine/pool"


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up and the pass over the pool."""
    warmup = inputs.warmup(inputs.config, "warmup")
    targets = [inputs.target(name) for name in inputs.config.data.targets]
    return warmup, inputs.pool_pass(_FOLDER, warmup, *targets)


def check(config: Config) -> None:
    """Find out whether the aggregation makes sense.

    Raises:
        ConfigError: If it is `task-mean`: no mean gradient is at hand.
    """
    if config.gist.aggregation == "task-mean":
        raise ConfigError("method=cosine has no gist.aggregation=task-mean; use max or mean-cosine")


def measure(job: Job) -> None:
    """Leave the inner products of every pool gradient with those of all targets.

    Raises:
        NumericsError: If a gradient is not finite.
    """
    warmup, products = stages(job.inputs)
    checkpoints = job.warm_up(warmup, job.config)
    with job.pool_stage(products, [c.label for c in checkpoints]) as todo:
        if todo:
            for checkpoint in checkpoints:
                units = {
                    name: job.call(partial(_to_unit_length, job, name, checkpoint))
                    for name in job.targets
                }
                project_pool(job, checkpoint, _FOLDER, units)


def scores(job: Job) -> dict[str, Alignment]:
    """Return the cosines, aggregated as `gist.aggregation` says."""
    checkpoints = job.checkpoints(stages(job.inputs)[0])
    aggregation = job.config.gist.aggregation
    return {
        name: Alignment(
            Table([(_Cosines(job, name, c), c.weight) for c in checkpoints]),
            job.tasks(name),
            aggregation,
        )
        for name in job.targets
    }


def facts(job: Job) -> dict[str, np.ndarray]:
    """Return loss and gradient norm of every pool example at the last checkpoint."""
    last = job.checkpoints(stages(job.inputs)[0])[-1].label
    return {name: job.stored(_FOLDER, name, last)[:] for name in ("loss", "gradient_norm")}


def settings(config: Config) -> dict[str, object]:
    """Return what the scores depend on besides the inner products."""
    return config.gist.model_dump(include={"aggregation"})


METHOD = Method(scores, stages, measure, settings, facts, check)


class _Cosines:
    """Inner products with target gradients of length 1, over the norm of the pool gradient."""

    def __init__(self, job: Job, name: str, checkpoint: Checkpoint) -> None:
        self._products = job.stored(_FOLDER, f"coordinates/{name}", checkpoint.label)
        self._norms = job.stored(_FOLDER, "gradient_norm", checkpoint.label)

    def __len__(self) -> int:
        return len(self._products)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        norms = self._norms[rows][:, None]
        return self._products[rows] / np.where(norms > 0, norms, 1)


def _to_unit_length(job: Job, name: str, checkpoint: Checkpoint) -> np.ndarray:
    """Return the diagonal matrix that brings a target's gradients to length 1."""
    from gradsift.gradients.gram import fitting_gram

    target = job.targets[name]
    examples, inverse = distinct_examples(target)
    gram = fitting_gram(job.models.at(checkpoint.path), examples, job.config.engine)
    squares = np.diag(gram)[inverse]
    if not np.isfinite(squares).all():
        broken = np.flatnonzero(~np.isfinite(squares))
        raise not_finite(f"gradient of the target {name!r}", target, broken)
    return np.diag(np.where(squares > 0, 1 / np.sqrt(np.where(squares > 0, squares, 1)), 0))

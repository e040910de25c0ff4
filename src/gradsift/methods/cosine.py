"""Cosine of whole gradients, without a subspace: the ablation that says what the SVD buys.

The directions of the pool pass are the target gradients themselves, at length 1.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradsift.config import Config, EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import ConfigError
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
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import PerNorm, Table

if TYPE_CHECKING:
    from gradsift.models.cache import ModelCache


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up and the pass over the pool."""
    targets = [inputs.target_stage(name) for name in inputs.target_names]
    warmup = inputs.warmup_stage
    return warmup, inputs.make_pool_pass_stage(layout.COSINE_PRODUCTS, warmup, *targets)


def check(config: Config) -> None:
    """Find out whether the aggregation makes sense.

    Raises:
        ConfigError: If it is `task-mean`: no mean gradient is at hand.
    """
    if config.gist.aggregation == "task-mean":
        raise ConfigError("method=cosine has no gist.aggregation=task-mean; use max or mean-cosine")


def measure(job: Job) -> None:
    """Store the inner products of every pool gradient with those of all targets.

    Raises:
        NumericsError: If a gradient is not finite.
    """
    warmup, products = stages(job.inputs)
    checkpoints = job.warm_up(warmup)
    factories = {c.label: partial(_factory, job, c.path) for c in checkpoints}
    job.pool_pass(products.name).run(products, factories)


def scores(job: Job) -> dict[str, Alignment]:
    """Return the cosines, aggregated as `gist.aggregation` says."""
    checkpoints = job.checkpoints()
    aggregation, products = job.config.gist.aggregation, job.pool_pass(layout.COSINE_PRODUCTS)
    norms = [products.read("gradient_norm", c.label) for c in checkpoints]
    found = {}
    for name in job.targets:
        stored = [products.read(coordinates_key(name), c.label) for c in checkpoints]
        cosines = map(PerNorm, stored, norms)
        weights = (checkpoint.weight for checkpoint in checkpoints)
        table = Table([*zip(cosines, weights, strict=True)])
        found[name] = Alignment(table, job.tasks(name), aggregation)
    return found


def facts(job: Job) -> dict[str, np.ndarray]:
    """Return loss and gradient norm of every pool example at the last checkpoint."""
    return losses_and_norms(job.pool_pass(layout.COSINE_PRODUCTS), job.checkpoints()[-1].label)


def settings(config: Config) -> dict[str, object]:
    """Return what the scores depend on besides the inner products."""
    return config.gist.model_dump(include={"aggregation"})


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return the warm-up, the lengths of target gradients, and the pass over the pool."""
    targets = sizes.all_targets
    return [
        *warm_up(config.warmup, sizes),
        *gram_of_targets(config, sizes, "gradients of"),
        *projected(targets, sizes.pool, targets.num_examples, config.warmup),
    ]


METHOD = Method(scores, stages, measure, settings, facts, check, work=work)


def _factory(job: Job, adapter: Path) -> MeasureFactory:
    """Return what projects on the target gradients of an adapter, brought to length 1."""
    units = {
        name: job.call(
            partial(_to_unit_length, job.models, adapter, name, target, job.config.engine)
        )
        for name, target in job.targets.items()
    }
    parts, widths = by_target(job.targets, units)
    return partial(make_projection_measure, job.models, adapter, parts, widths, job.config)


def _to_unit_length(
    models: ModelCache, adapter: Path, name: str, target: EncodedSet, engine: EngineConfig
) -> np.ndarray:
    """Return the diagonal matrix that brings a target's gradients to length 1."""
    from gradsift.gradients.distinct import distinct_examples
    from gradsift.gradients.gram import fitting_gram

    examples, inverse = distinct_examples(target)
    gram = fitting_gram(models.with_adapter(adapter), examples, engine)
    squares = np.diag(gram)[inverse]
    if not np.isfinite(squares).all():
        broken = np.flatnonzero(~np.isfinite(squares))
        raise not_finite(f"gradient of the target {name!r}", target, broken)
    return np.diag(np.where(squares > 0, 1 / np.sqrt(np.where(squares > 0, squares, 1)), 0))

"""Cosine of whole gradients, without a subspace: the ablation that says what the SVD buys.

The directions of the pool pass are the target gradients themselves, at length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradsift.config import Config, EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import ConfigError
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.products import Products
from gradsift.methods.work import Sizes, Work, gram_of_targets, projected, warm_up
from gradsift.pool.coordinates import Directions, by_target
from gradsift.pool.examples import not_finite
from gradsift.runs import layout
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import PerNorm, Table
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from gradsift.models.cache import ModelCache


_PRODUCTS = Products(layout.cosine_products)


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up and the pass over the pool for each target."""
    return inputs.warmup_stage, *_product_stages(inputs).values()


def _product_stages(inputs: Inputs) -> dict[str, Stage]:
    warmup, names = inputs.warmup_stage, inputs.target_names
    return {
        name: _PRODUCTS.stage(inputs, name, warmup, inputs.target_stage(name)) for name in names
    }


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
    checkpoints = job.warm_up(job.inputs.warmup_stage)
    products = _product_stages(job.inputs)
    _PRODUCTS.measure(job, products, checkpoints, partial(_directions, job))


def scores(job: Job) -> dict[str, Alignment]:
    """Return the cosines, aggregated as `gist.aggregation` says."""
    found = {}
    for name in job.targets:
        cosines = [
            (
                PerNorm(_PRODUCTS.read(job, name, c.label), _PRODUCTS.norms(job, name, c.label)),
                c.weight,
            )
            for c in job.checkpoints()
        ]
        found[name] = Alignment(Table(cosines), job.tasks(name), job.config.gist.aggregation)
    return found


def settings(config: Config) -> dict[str, object]:
    """Return what the scores depend on besides the inner products."""
    return config.gist.model_dump(include={"aggregation"})


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return the warm-up, the lengths of target gradients, and the pass over the pool."""
    targets = sizes.all_targets
    return [
        *warm_up(config.warmup, sizes),
        *gram_of_targets(config, sizes, "gradients of"),
        *projected(targets, sizes, targets.num_examples, config.warmup),
    ]


METHOD = Method(
    scores, stages, measure, settings, _PRODUCTS.facts, check, work=work, reads_index=True
)


def _directions(job: Job, checkpoint: Checkpoint, names: Sequence[str]) -> Directions:
    """Return some targets' gradients at a checkpoint, brought to length 1."""
    engine = job.config.engine
    args = {name: (job.models, checkpoint.path, name, job.targets[name], engine) for name in names}
    units = {name: job.call(partial(_to_unit_length, *own)) for name, own in args.items()}
    return by_target(job.targets, units)


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

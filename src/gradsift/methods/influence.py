"""Influence functions with the full, coupled empirical Fisher matrix of the LoRA gradients.

After Koh and Liang, 2017, arXiv 1703.04730: what a step on a pool example g does to the loss of a
target example q is ⟨g, F⁻¹q⟩, F being the curvature. Here F = SᵀS/N + λI, with S the gradients of
N random pool examples, inverted exactly on their span (`gradients/curvature.py`); Grosse et al.,
2023, arXiv 2308.03296, take a Kronecker-factored F per layer instead. Every F⁻¹q is brought to
length 1, so that target examples compare, and the product is divided by ‖g‖. For g in the sample F
is taken without g: its own row would hide what no other row has in common with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gradsift.config import Config
from gradsift.errors import NumericsError
from gradsift.gradients.curvature import (
    InverseFisher,
    load_curvature,
    measure_curvature,
    save_curvature,
)
from gradsift.gradients.distinct import distinct_examples, merge_equal, merge_rows
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.products import Products
from gradsift.methods.work import Sizes, Work, num_checkpoints, projected, warm_up
from gradsift.pool import coordinates as directions
from gradsift.pool.examples import not_finite
from gradsift.runs import layout
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Directions, PerNorm
from gradsift.types import Checkpoint

logger = logging.getLogger(__name__)


_PRODUCTS = Products(layout.influence_products, from_index=False)


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up, and each target's Gram matrix with the sample and pass over the pool."""
    curvatures = _curvature_stages(inputs)
    products = _product_stages(inputs, curvatures)
    return inputs.warmup_stage, *curvatures.values(), *products.values()


def _curvature_stages(inputs: Inputs) -> dict[str, Stage]:
    drawn = inputs.config.influence.model_dump(include={"samples", "seed"})
    folders = {name: inputs.at(layout.curvatures(name)) for name in inputs.target_names}
    pool, warmup = inputs.pool_stage, inputs.warmup_stage
    return {
        name: Stage(folder, drawn, (folder,), (pool, inputs.target_stage(name), warmup))
        for name, folder in folders.items()
    }


def _product_stages(inputs: Inputs, curvatures: Mapping[str, Stage]) -> dict[str, Stage]:
    damping = inputs.config.influence.damping
    return {
        name: _PRODUCTS.stage(inputs, name, curvature, damping=damping)
        for name, curvature in curvatures.items()
    }


def measure(job: Job) -> None:
    """Store adapters, Gram matrices, and the products of every pool gradient with all F⁻¹q.

    Raises:
        NumericsError: If a gradient is not finite, or all of a target or of the sample are zero.
    """
    checkpoints, curvatures = job.warm_up(job.inputs.warmup_stage), _curvature_stages(job.inputs)
    with job.folder.stages([(stage, True) for stage in curvatures.values()]) as todo:
        names = [name for name, is_to_do in zip(curvatures, todo, strict=True) if is_to_do]
        if names:
            outputs = [job.path(curvatures[name].name) for name in names]
            job.call(partial(_measure_curvatures, job, checkpoints, names), *outputs)
    products = _product_stages(job.inputs, curvatures)
    _PRODUCTS.measure(job, products, checkpoints, partial(_directions, job))


def scores(job: Job) -> dict[str, Alignment]:
    """Return ⟨g, F⁻¹q⟩ over both lengths, aggregated as `influence.aggregation` says."""
    checkpoints, found = job.checkpoints(), {}
    for name in job.targets:
        parts, grams = [], []
        for checkpoint in checkpoints:
            inverse = _invert(job, name, checkpoint)
            stored = _PRODUCTS.read(job, name, checkpoint.label)
            cosines = PerNorm(stored, _norms(job, name, checkpoint, inverse))
            parts.append((cosines, checkpoint.weight))
            grams.append(inverse.products)
        directions = Directions(parts, grams)
        found[name] = Alignment(directions, job.tasks(name), job.config.influence.aggregation)
    return found


def settings(config: Config) -> Mapping[str, Any]:
    """Return what the scores depend on besides the products."""
    return config.influence.model_dump(include={"aggregation", "normalize"})


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return the warm-up, the Gram matrix of targets and sample, and the pass over the pool."""
    sample = sizes.pool.of_part(min(config.influence.samples, sizes.pool.num_examples))
    gathered, passes = sizes.all_targets + sample, num_checkpoints(config.warmup)
    rows = gathered.num_examples
    return [
        *warm_up(config.warmup, sizes),
        Work("curvature", "gram", gathered, passes, directions=rows, kept=8 * rows),
        *projected(gathered, sizes, sizes.all_targets.num_examples, config.warmup),
    ]


METHOD = Method(scores, stages, measure, settings, _PRODUCTS.facts, work=work)


def _sample(job: Job) -> np.ndarray:
    """Return the rows of the pool whose gradients make the Fisher matrix."""
    config, num_pool = job.config.influence, len(job.pool)
    rng = np.random.default_rng(config.seed)
    return np.sort(rng.choice(num_pool, size=min(config.samples, num_pool), replace=False))


def _rows(job: Job, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return where each target's examples, and the sample's, are among all, which come last."""
    ends = np.cumsum([len(job.targets[name]) for name in names])
    sample = ends[-1] + np.arange(len(_sample(job)))
    starts = [0, *ends[:-1]]
    return {
        name: np.concatenate([np.arange(start, end), sample])
        for name, start, end in zip(names, starts, ends, strict=True)
    }


def _measure_curvatures(job: Job, checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> None:
    """Store the inner products of the gradients of each target and the sample."""
    from gradsift.gradients.gram import fitting_gram
    from gradsift.models.kernels import precision_of

    found = [distinct_examples(job.targets[name]) for name in names]
    found.append(distinct_examples(job.pool, _sample(job)))
    parts, num_samples = [len(examples) for examples, _ in found], len(_sample(job))
    starts = [0, *np.cumsum(parts)[:-1].tolist()]
    examples = [example for own, _ in found for example in own]
    inverse = np.concatenate([s + own for s, (_, own) in zip(starts, found, strict=True)])
    for checkpoint in checkpoints:
        model = job.models.with_adapter(checkpoint.path)
        gram = fitting_gram(model, examples, job.config.engine, parts)[np.ix_(inverse, inverse)]
        for name, rows in _rows(job, names).items():
            own = gram[np.ix_(rows, rows)]
            _check(job, name, np.diag(own))
            curvature = measure_curvature(own, num_samples, precision_of(model))
            save_curvature(curvature, job.path(layout.curvature(name, checkpoint.label)))
        counts = (checkpoint.label, len(inverse) - num_samples, num_samples)
        logger.info("curvature at %s: %d target examples, %d of the pool", *counts)


def _check(job: Job, name: str, squares: np.ndarray) -> None:
    """Find out whether the squared lengths of a target's and the sample's gradients are of use.

    Raises:
        NumericsError: If one is not finite, or all of the target are zero.
    """
    sample = _sample(job)
    of_target, of_sample = squares[: -len(sample)], squares[-len(sample) :]
    broken = np.flatnonzero(~np.isfinite(of_target))
    if len(broken):
        raise not_finite(f"gradient of the target {name!r}", job.targets[name], broken)
    if not of_target.any():
        raise NumericsError(
            f"every gradient of the target {name!r} is zero: the model already predicts it with "
            "certainty"
        )
    broken = np.flatnonzero(~np.isfinite(of_sample))
    if len(broken):
        raise not_finite("gradient of the pool", job.pool, sample[broken])


def _invert(job: Job, name: str, checkpoint: Checkpoint) -> InverseFisher:
    """Return F⁻¹ on a target's gradients at a checkpoint."""
    curvature = load_curvature(job.path(layout.curvature(name, checkpoint.label)))
    return curvature.invert(job.config.influence.damping)


def _norms(job: Job, name: str, checkpoint: Checkpoint, inverse: InverseFisher) -> np.ndarray:
    """Return what the products of each pool example are divided by: ‖g‖, or 1.

    For one of the sample, times what makes its product that under the F that lacks it.
    """
    stored = _PRODUCTS.norms(job, name, checkpoint.label)
    norms = stored[:] if job.config.influence.normalize else np.ones(len(job.pool))
    norms = np.array(norms, np.float32)
    norms[_sample(job)] *= inverse.left_out
    return norms


def _directions(job: Job, checkpoint: Checkpoint, names: Sequence[str]) -> directions.Directions:
    """Return the F⁻¹q of some targets at a checkpoint, each made of its examples and the sample."""
    parts = []
    for name in names:
        target = job.targets[name]
        sample = job.pool.examples(_sample(job))
        examples, inverse = merge_equal([*target.examples(range(len(target))), *sample])
        own = _invert(job, name, checkpoint).combination
        parts.append((examples, merge_rows(own, inverse, len(examples))))
    return parts, {name: len(job.targets[name]) for name in names}

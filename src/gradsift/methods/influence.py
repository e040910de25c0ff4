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
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.config import Config
from gradsift.errors import NumericsError
from gradsift.gradients.curvature import (
    InverseFisher,
    load_curvature,
    measure_curvature,
    save_curvature,
)
from gradsift.gradients.distinct import merge_equal, merge_rows
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.work import Sizes, Work, num_checkpoints, projected, warm_up
from gradsift.pool.coordinates import (
    coordinates_key,
    losses_and_norms,
    make_projection_measure,
)
from gradsift.pool.examples import MeasureFactory, not_finite
from gradsift.runs import layout
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Directions, PerNorm
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from gradsift.data.encoding import Encoded

logger = logging.getLogger(__name__)


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up, the Gram matrices of targets and sample, and the pass over the pool."""
    warmup, config = inputs.warmup_stage, inputs.config.influence
    sources = (inputs.pool_stage, *map(inputs.target_stage, inputs.target_names), warmup)
    drawn = config.model_dump(include={"samples", "seed"})
    kept = inputs.at(layout.CURVATURE)
    curvature = Stage(kept, drawn, (kept,), sources)
    name, damping = layout.INFLUENCE_PRODUCTS, config.damping
    return warmup, curvature, inputs.make_pool_pass_stage(name, curvature, damping=damping)


def measure(job: Job) -> None:
    """Store adapters, Gram matrices, and the products of every pool gradient with all F⁻¹q.

    Raises:
        NumericsError: If a gradient is not finite, or all of a target or of the sample are zero.
    """
    warmup, curvature, products = stages(job.inputs)
    checkpoints = job.warm_up(warmup)
    with job.folder.stage(curvature) as todo:
        if todo:
            job.call(partial(_measure_curvatures, job, checkpoints), job.path(curvature.name))
    factories = {c.label: partial(_factory, job, c) for c in checkpoints}
    job.pool_pass(products.name).run(products, factories)


def scores(job: Job) -> dict[str, Alignment]:
    """Return ⟨g, F⁻¹q⟩ over both lengths, aggregated as `influence.aggregation` says."""
    checkpoints, pool = job.checkpoints(), job.pool_pass(layout.INFLUENCE_PRODUCTS)
    inverses = [_invert(job, checkpoint) for checkpoint in checkpoints]
    norms = [_norms(job, *pair) for pair in zip(checkpoints, inverses, strict=True)]
    weights = [checkpoint.weight for checkpoint in checkpoints]
    found = {}
    for name, own in _places(job).items():
        stored = [pool.read(coordinates_key(name), c.label) for c in checkpoints]
        parts = [*zip(map(PerNorm, stored, norms), weights, strict=True)]
        directions = Directions(parts, [inverse.products[own, own] for inverse in inverses])
        found[name] = Alignment(directions, job.tasks(name), job.config.influence.aggregation)
    return found


def facts(job: Job) -> dict[str, np.ndarray]:
    """Return loss and gradient norm of every pool example at the last checkpoint."""
    return losses_and_norms(job.pool_pass(layout.INFLUENCE_PRODUCTS), job.checkpoints()[-1].label)


def settings(config: Config) -> Mapping[str, Any]:
    """Return what the scores depend on besides the products."""
    return config.influence.model_dump(include={"aggregation", "normalize"})


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return the warm-up, the Gram matrix of targets and sample, and the pass over the pool."""
    num_targets = sizes.all_targets.num_examples
    sample = sizes.pool.of_part(min(config.influence.samples, sizes.pool.num_examples))
    gathered, passes = sizes.all_targets + sample, num_checkpoints(config.warmup)
    rows = gathered.num_examples
    return [
        *warm_up(config.warmup, sizes),
        Work("curvature", "gram", gathered, passes, directions=rows, kept=8 * rows),
        *projected(gathered, sizes.pool, num_targets, config.warmup),
    ]


METHOD = Method(scores, stages, measure, settings, facts, work=work)


def _sample(job: Job) -> np.ndarray:
    """Return the rows of the pool whose gradients make the Fisher matrix."""
    config, num_pool = job.config.influence, len(job.pool)
    rng = np.random.default_rng(config.seed)
    return np.sort(rng.choice(num_pool, size=min(config.samples, num_pool), replace=False))


def _examples(job: Job) -> tuple[list[Encoded], np.ndarray]:
    """Return the different examples of all targets and the sample, and for each which it is."""
    asked_for = [(target, np.arange(len(target))) for target in job.targets.values()]
    asked_for.append((job.pool, _sample(job)))
    return merge_equal([e for encoded, rows in asked_for for e in encoded.examples(rows)])


def _places(job: Job) -> dict[str, slice]:
    """Return where each target's examples stand among those of all targets."""
    ends = np.cumsum([len(target) for target in job.targets.values()]).tolist()
    return dict(zip(job.targets, map(slice, [0, *ends], ends), strict=True))


def _measure_curvatures(job: Job, checkpoints: Sequence[Checkpoint]) -> None:
    """Store the inner products of the gradients of all targets and the sample."""
    from gradsift.gradients.gram import fitting_gram
    from gradsift.models.kernels import precision_of

    examples, inverse = _examples(job)
    num_samples = len(_sample(job))
    for checkpoint in checkpoints:
        model = job.models.with_adapter(checkpoint.path)
        gram = fitting_gram(model, examples, job.config.engine)[np.ix_(inverse, inverse)]
        _check(job, np.diag(gram))
        curvature = measure_curvature(gram, num_samples, precision_of(model))
        save_curvature(curvature, job.path(layout.curvature(checkpoint.label)))
        counts = (checkpoint.label, len(inverse) - num_samples, num_samples)
        logger.info("curvature at %s: %d target examples, %d of the pool", *counts)


def _check(job: Job, squares: np.ndarray) -> None:
    """Find out whether the squared lengths of the gradients can be worked with.

    Raises:
        NumericsError: If one is not finite, or all of a target are zero.
    """
    for name, own in _places(job).items():
        broken = np.flatnonzero(~np.isfinite(squares[own]))
        if len(broken):
            raise not_finite(f"gradient of the target {name!r}", job.targets[name], broken)
        if not squares[own].any():
            raise NumericsError(
                f"every gradient of the target {name!r} is zero: the model already predicts it "
                "with certainty"
            )
    sample = _sample(job)
    broken = np.flatnonzero(~np.isfinite(squares[-len(sample) :]))
    if len(broken):
        raise not_finite("gradient of the pool", job.pool, sample[broken])


def _invert(job: Job, checkpoint: Checkpoint) -> InverseFisher:
    """Return F⁻¹ on the target gradients at a checkpoint."""
    curvature = load_curvature(job.path(layout.curvature(checkpoint.label)))
    return curvature.invert(job.config.influence.damping)


def _norms(job: Job, checkpoint: Checkpoint, inverse: InverseFisher) -> np.ndarray:
    """Return what the products of each pool example are divided by: ‖g‖, or 1.

    For one of the sample, times what makes its product that under the F that lacks it.
    """
    pool = job.pool_pass(layout.INFLUENCE_PRODUCTS)
    normalize = job.config.influence.normalize
    norms = pool.read("gradient_norm", checkpoint.label)[:] if normalize else np.ones(len(job.pool))
    norms = np.array(norms, np.float32)
    norms[_sample(job)] *= inverse.left_out
    return norms


def _factory(job: Job, checkpoint: Checkpoint) -> MeasureFactory:
    """Return what multiplies with the F⁻¹q of all targets at a checkpoint."""
    examples, inverse = _examples(job)
    combination = _invert(job, checkpoint).combination
    parts = [(examples, merge_rows(combination, inverse, len(examples)))]
    widths = {name: len(target) for name, target in job.targets.items()}
    args = (job.models, checkpoint.path, parts, widths, job.config)
    return partial(make_projection_measure, *args)

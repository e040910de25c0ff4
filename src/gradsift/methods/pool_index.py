"""The index of a pool: the stages that make it, and what a run asks it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gradsift.errors import RunError
from gradsift.methods.job import Inputs, Job
from gradsift.pool.coordinates import Directions
from gradsift.pool.examples import MeasureFactory, not_finite
from gradsift.pool.sketches import StoredSketches, make_sketch_measure, sketch_combinations
from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.runs.indexes import take_over
from gradsift.runs.stage import Stage
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float


def index_stages(inputs: Inputs) -> tuple[Stage, Stage]:
    """Return the stages that choose what gradients are multiplied with, and that do it."""
    settings, warmup = inputs.config.index.model_dump(exclude={"path"}), inputs.warmup_stage
    folder = layout.SKETCHES
    sketches = Stage(folder, settings, (folder,), (inputs.pool_stage, warmup))
    return sketches, inputs.make_pool_pass_stage(layout.INDEX, warmup, sketches)


def measure_index(job: Job) -> None:
    """Store adapters, sketches, and the pool as they see it.

    Raises:
        NumericsError: If a gradient is not finite.
        ConfigError: If `index.dimension` is too small for the adapter.
    """
    checkpoints = job.warm_up(job.inputs.warmup_stage)
    sketches, pool = index_stages(job.inputs)
    with job.folder.stage(sketches) as todo:
        if todo:
            for checkpoint in checkpoints:
                path = job.path(layout.sketch(checkpoint.label))
                job.call(partial(_fit, job, checkpoint), path)
    factories = {c.label: partial(_factory, job, c) for c in checkpoints}
    job.pool_pass(layout.INDEX).run(pool, factories)


def stages_of_index(folder: Run, inputs: Inputs) -> list[Stage]:
    """Return the stages that are not to be lost because of an index that a folder holds or asks.

    To encode the pool is cheap, but its index would go with it.
    """
    own = (folder.path / layout.INDEX_CONFIG).exists()
    kept = [replace(inputs.pool_stage, cheap=False)] if own else []
    return kept + ([index_stages(inputs)[0]] if inputs.asks else [])


def check_index(inputs: Inputs) -> None:
    """Find out whether the index that a run asks is the one that its settings name.

    Raises:
        RunError: If it is not, or is not finished; it says what differs.
    """
    if inputs.index is None:
        return
    wanted = (inputs.pool_stage, inputs.warmup_stage, *index_stages(inputs))
    ours, theirs = inputs.config.data, inputs.index.config.data
    fault = "; ".join(
        f"data.{key} was {before!r}, is now {getattr(ours, key)!r}"
        for key, before in theirs
        if key != "targets" and before != getattr(ours, key)
    )
    if fault := fault or inputs.index.run.find_fault(wanted):
        raise RunError(
            f"the index in {inputs.config.index.path} cannot serve this run: {fault}. Give no "
            "other model, pool, adapter or index settings than it was made with, or make another; "
            "where it is not finished, run `gradsift index` with it again"
        )


def take_from_index(folder: Run, inputs: Inputs) -> None:
    """Let the folder hold pool, adapters and sketches of the index that it is to ask, if any."""
    if inputs.index is not None and inputs.index.run.path.resolve() != folder.path.resolve():
        stages = (inputs.pool_stage, inputs.warmup_stage, index_stages(inputs)[0])
        take_over(folder, inputs.index.run, stages)


def read_sketches(job: Job, checkpoint: Checkpoint) -> StoredSketches:
    """Return the pool's sketches at a checkpoint, where they lie.

    Raises:
        RunError: If shards are missing or damaged.
    """
    index = job.inputs.index
    assert index is not None, "only a run that asks an index reads one"
    stored = replace(job.pool_pass(layout.INDEX), folder=index.run)
    return StoredSketches(stored, checkpoint.label)


def expected_error(job: Job) -> float | None:
    """Return by how much the product of two gradients of length 1 is off, if an index is asked."""
    if job.inputs.asks is None or job.config.method not in ("gist", "cosine"):
        return None
    from gradsift.gradients.sketch import read_expected_error

    return read_expected_error(job.path(layout.sketch(job.checkpoints()[-1].label)))


def sketch_directions(
    job: Job, checkpoint: Checkpoint, directions: Directions
) -> Float[np.ndarray, "direction number"]:
    """Return the sketches of directions: of combinations of examples' gradients."""
    path, (parts, _) = job.path(layout.sketch(checkpoint.label)), directions
    args = (job.models, checkpoint.path, path, parts, job.config.engine)
    return job.call(partial(sketch_combinations, *args))


def _fit(job: Job, checkpoint: Checkpoint) -> None:
    from gradsift.gradients.sketch import fit_sketch

    config, num_pool = job.config.index, len(job.pool)
    rng = np.random.default_rng(config.seed)
    rows = rng.choice(num_pool, size=min(config.samples, num_pool), replace=False)
    model, path = job.models.with_adapter(checkpoint.path), layout.sketch(checkpoint.label)

    def check(squares: np.ndarray) -> None:
        if len(broken := np.flatnonzero(~np.isfinite(squares))):
            raise not_finite("gradient of the pool", job.pool, rows[broken])

    fit_sketch(model, job.pool.examples(rows), job.config, job.path(path), check)


def _factory(job: Job, checkpoint: Checkpoint) -> MeasureFactory:
    path = job.path(layout.sketch(checkpoint.label))
    return partial(make_sketch_measure, job.models, checkpoint.path, path)

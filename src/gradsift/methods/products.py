"""Inner products of every pool gradient with directions of the targets: a stage for each target.

What `gist`, `cosine` and `influence` store of the pool. Targets that are missing are measured in
one pass, and a target's bytes are the same whatever other targets are measured beside it. Where an
index is there to be asked, they are read out of it, approximately and without a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gradsift.methods.job import Inputs, Job
from gradsift.methods.pool_index import read_sketches, sketch_directions
from gradsift.pool.coordinates import (
    Directions,
    StoredCoordinates,
    losses_and_norms,
    make_projection_measure,
    read_coordinates,
    to_store,
)
from gradsift.pool.examples import MeasureFactory
from gradsift.pool.pool_pass import PoolPass, run_together, store_together
from gradsift.pool.shards import Shard, StoredTensor
from gradsift.runs import layout
from gradsift.runs.indexes import AskedIndex
from gradsift.runs.stage import Stage
from gradsift.types import Checkpoint


@dataclass(frozen=True)
class Products:
    """What a method keeps of the pool; `name_of(target)` is the stage of a target.

    `from_index`: whether it is read out of an index, where the run asks one.
    """

    name_of: Callable[[str], str]
    from_index: bool = True

    def stage(self, inputs: Inputs, target: str, *sources: Stage, **settings: object) -> Stage:
        """Return the stage that measures the pool for a target, or asks the index."""
        if (index := self._asked(inputs)) is None:
            return inputs.make_pool_pass_stage(self.name_of(target), *sources, **settings)
        place = inputs.at(layout.from_index(self.name_of(target)))
        settings |= inputs.config.engine.model_dump(include={"shard_size"}) | {"index": index.key}
        sources = (inputs.pool_stage, *sources)
        return Stage(place, settings, (place,), sources, cheap=True, keeps_parts=True)

    def measure(
        self,
        job: Job,
        stages: Mapping[str, Stage],
        checkpoints: Sequence[Checkpoint],
        directions: Callable[[Checkpoint, Sequence[str]], Directions],
    ) -> None:
        """Measure what is not there yet of some targets, whose stages are given, in one pass.

        `directions(checkpoint, targets)` returns those of some targets.

        Raises:
            NumericsError: If a gradient is not finite.
        """
        passes = [(self._pass(job, target), stage) for target, stage in stages.items()]
        if self._asked(job.inputs):
            makers = {c.label: partial(_read_index, job, c, directions) for c in checkpoints}
            store_together(passes, makers)
        else:
            factories = {c.label: partial(_factory, job, c, directions) for c in checkpoints}
            run_together(passes, factories)

    def read(self, job: Job, target: str, checkpoint: str) -> StoredCoordinates:
        """Return the products of every pool example for a target at a checkpoint."""
        return read_coordinates(self._pass(job, target), checkpoint)

    def norms(self, job: Job, target: str, checkpoint: str) -> StoredTensor:
        """Return the gradient norm of every pool example at a checkpoint."""
        return self._pass(job, target).read("gradient_norm", checkpoint)

    def facts(self, job: Job) -> dict[str, np.ndarray]:
        """Return loss and gradient norm of every pool example at the last checkpoint."""
        first = self._pass(job, next(iter(job.targets)))
        return losses_and_norms(first, job.checkpoints()[-1].label)

    def _asked(self, inputs: Inputs) -> AskedIndex | None:
        return inputs.asks if self.from_index else None

    def _pass(self, job: Job, target: str) -> PoolPass:
        name = self.name_of(target)
        return job.pool_pass(layout.from_index(name) if self._asked(job.inputs) else name, target)


def _factory(
    job: Job,
    checkpoint: Checkpoint,
    directions: Callable[[Checkpoint, Sequence[str]], Directions],
    names: Sequence[str],
) -> MeasureFactory:
    """Return what measures the products of some targets in a pass over the pool."""
    given = directions(checkpoint, names)
    return partial(make_projection_measure, job.models, checkpoint.path, *given, job.config)


def _read_index(
    job: Job,
    checkpoint: Checkpoint,
    directions: Callable[[Checkpoint, Sequence[str]], Directions],
    names: Sequence[str],
) -> Callable[[Shard], Mapping[str, np.ndarray]]:
    """Return what reads the products of some targets for a shard out of the index."""
    given, index = directions(checkpoint, names), read_sketches(job, checkpoint)
    rows, widths = sketch_directions(job, checkpoint, given), given[1]

    def measure(shard: Shard) -> dict[str, np.ndarray]:
        found = index.products(rows, shard.start, shard.stop)
        found |= to_store(found.pop("products"), widths)
        return {name: tensor.numpy() for name, tensor in found.items()}

    return measure

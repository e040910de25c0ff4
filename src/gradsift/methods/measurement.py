"""What a method measures of pool and targets alike, kept in the run folder and read back.

For methods that compare pool and target examples by the same features: `rds`, `less`, `embed`.
Those that project on target gradients (`gist`, `cosine`) keep a pool pass alone (`Job.pool_pass`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from gradsift.methods.job import Inputs, Job
from gradsift.pool.examples import MeasureFactory, check_finite, measure_examples
from gradsift.pool.pool_pass import FactoriesByCheckpoint, PoolPass
from gradsift.pool.shards import StoredTensor
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View


@dataclass(frozen=True)
class Measurement:
    """Tensors with a row per example, stored in `NAME/pool` and `NAME/targets`.

    `at_checkpoints`: once for each checkpoint of a warm-up, not once in all.
    """

    name: str
    at_checkpoints: bool = False

    def stages(self, inputs: Inputs, *sources: Stage, **settings: Any) -> tuple[Stage, ...]:
        """Return the stages that measure every target, then the pool.

        `sources` and `settings`: what the results depend on besides the examples.
        """
        of_targets = (self._target_stage(inputs, t, sources, settings) for t in inputs.target_names)
        return (*of_targets, self.pool_stage(inputs, *sources, **settings))

    def pool_stage(self, inputs: Inputs, *sources: Stage, **settings: Any) -> Stage:
        """Return the stage that measures the pool alone."""
        return inputs.make_pool_pass_stage(layout.measured_pool(self.name), *sources, **settings)

    def measure(self, job: Job, stages: Sequence[Stage], factory: MeasureFactory) -> None:
        """Measure what is not there yet of targets and pool, where there are no checkpoints.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        *of_targets, of_pool = stages
        self.measure_targets(job, of_targets, {"": lambda: factory})
        self.measure_pool(job, of_pool, {"": lambda: factory})

    def measure_pool(self, job: Job, stage: Stage, factories: FactoriesByCheckpoint) -> None:
        """Measure what is not there yet of the pool.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        self.pool_pass(job).run(stage, factories)

    def measure_targets(
        self, job: Job, stages: Sequence[Stage], factories: FactoriesByCheckpoint
    ) -> None:
        """Measure what is not there yet of the targets.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        engine = job.config.engine
        for (target, examples), stage in zip(job.targets.items(), stages, strict=True):
            with job.folder.stage(stage) as todo:
                for label, make_factory in factories.items() if todo else ():
                    rows = np.arange(len(examples))
                    work = partial(measure_examples, examples, rows, make_factory(), engine)
                    self.save_target(job, target, job.call(work), label)

    def save_target(
        self, job: Job, target: str, tensors: Mapping[str, np.ndarray], label: str = ""
    ) -> None:
        """Store what was found of a target's examples.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        check_finite(tensors, f"of the target {target!r}", job.targets[target])
        path = job.path(layout.target_tensors(self.name, target, label))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(save_file, dict(tensors)))

    def pool_pass(self, job: Job) -> PoolPass:
        """Return the pass over the pool."""
        return job.pool_pass(layout.measured_pool(self.name))

    def read_pool(self, job: Job, key: str, label: str = "") -> StoredTensor:
        """Return what was found of the pool under a name, read as rows are asked for."""
        return self.pool_pass(job).read(key, label)

    def read_target(self, job: Job, target: str, key: str, label: str = "") -> np.ndarray:
        """Return what was found of a target under a name, in float32."""
        tensors = load_file(job.path(layout.target_tensors(self.name, target, label)))
        return np.asarray(tensors[key], np.float32)

    def nearest_cosines(self, job: Job, key: str) -> dict[str, Alignment]:
        """Return, for every target, the scores by the largest cosine with one of its examples."""
        pool = self.read_pool(job, key)
        return {
            name: Alignment(
                Cosines([View(pool, self.read_target(job, name, key))]), job.tasks(name), "max"
            )
            for name in job.targets
        }

    def _target_stage(
        self,
        inputs: Inputs,
        target: str,
        sources: tuple[Stage, ...],
        settings: Mapping[str, Any],
    ) -> Stage:
        name = inputs.at(layout.measured_target(self.name, target))
        output = name if self.at_checkpoints else layout.target_tensors(self.name, target)
        output = inputs.at(output)
        return Stage(name, settings, (output,), (inputs.target_stage(target), *sources))


BASE_FORWARD = Measurement(layout.BASE_FORWARD)
"""Losses and hidden states of the base model: `rds` and `perplexity` share its pool pass."""

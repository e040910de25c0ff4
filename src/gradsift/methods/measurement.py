"""What a method measures of pool and targets alike, kept in the run folder and read back.

For methods that compare pool and target examples by the same features: `rds`, `less`, `embed`.
Those that project on what the targets span keep a pass over the pool alone (`Job.pool_pass`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from gradsift.methods.job import Inputs, Job
from gradsift.pool.examples import Prepare, check_finite, measure_examples
from gradsift.pool.pool_pass import PoolPass
from gradsift.pool.shards import StoredTensor
from gradsift.runs.atomic import write_atomically
from gradsift.runs.stage import Stage

PrepareAt = Mapping[str, Callable[[], Prepare]]
"""What gives the measure, by the label of the checkpoint: an empty one where there is none."""


@dataclass(frozen=True)
class Measurement:
    """Tensors with a row per example: those of the pool in `NAME/pool`, of targets beside it."""

    name: str
    at_checkpoints: bool = False

    def pool_stage(self, inputs: Inputs, *sources: Stage, **settings: Any) -> Stage:
        """Return the stage that measures the pool, given what the results depend on."""
        return inputs.pool_pass(self._pool, *sources, **settings)

    def target_stages(self, inputs: Inputs, *sources: Stage, **settings: Any) -> tuple[Stage, ...]:
        """Return the stages that measure the targets, given what the results depend on."""
        return tuple(
            Stage(
                self._target(target),
                settings,
                (self._target(target) if self.at_checkpoints else self._file(target, ""),),
                (inputs.target(target), *sources),
            )
            for target in inputs.config.data.targets
        )

    def measure_pool(self, job: Job, stage: Stage, prepare: PrepareAt) -> None:
        """Measure what is not there yet of the pool.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        self.pool_pass(job).run(stage, prepare)

    def measure_targets(self, job: Job, stages: tuple[Stage, ...], prepare: PrepareAt) -> None:
        """Measure what is not there yet of the targets.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        engine = job.config.engine
        for (target, examples), stage in zip(job.targets.items(), stages, strict=True):
            with job.folder.stage(stage) as todo:
                for label, at_checkpoint in prepare.items() if todo else ():
                    rows = np.arange(len(examples))
                    work = partial(measure_examples, examples, rows, at_checkpoint(), engine)
                    self.save_target(job, target, job.call(work), label)

    def save_target(
        self, job: Job, target: str, tensors: Mapping[str, np.ndarray], label: str = ""
    ) -> None:
        """Store what was found of a target's examples.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        check_finite(tensors, f"of the target {target!r}", job.targets[target])
        path = job.path(self._file(target, label))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(save_file, dict(tensors)))

    def pool_pass(self, job: Job) -> PoolPass:
        """Return the pass over the pool."""
        return job.pool_pass(self._pool)

    def of_pool(self, job: Job, key: str, label: str = "") -> StoredTensor:
        """Return what was found of the pool under a name, read as rows are asked for."""
        return self.pool_pass(job).read(key, label)

    def of_target(self, job: Job, target: str, key: str, label: str = "") -> np.ndarray:
        """Return what was found of a target under a name, in float32."""
        return np.asarray(load_file(job.path(self._file(target, label)))[key], np.float32)

    @property
    def _pool(self) -> str:
        return f"{self.name}/pool"

    def _target(self, target: str) -> str:
        return f"{self.name}/targets/{target}"

    def _file(self, target: str, label: str) -> str:
        inner = f"/{label}" if self.at_checkpoints else ""
        return f"{self._target(target)}{inner}.safetensors"

"""RDS+: cosine of pooled hidden states of the base model (Ivison et al., 2025, arXiv 2503.01807).

An example is the mean of its last hidden states, the i-th token weighted by i; the most alike
target example counts. No warm-up, no gradient.
"""

from __future__ import annotations

import numpy as np

from gradsift.methods.base import Inputs, Method
from gradsift.methods.job import Job
from gradsift.pool.hidden_states import (
    pool_stage,
    run_over_pool,
    run_over_target,
    stored_pool,
    stored_target,
    target_stage,
)
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the passes of the base model over targets and pool."""
    targets = [target_stage(inputs, name) for name in inputs.config.data.targets]
    return *targets, pool_stage(inputs)


def measure(job: Job) -> None:
    """Leave the pooled hidden states of targets and pool."""
    for name in job.targets:
        run_over_target(job, name)
    run_over_pool(job)


def scores(job: Job) -> dict[str, Alignment]:
    """Return the largest cosine with a target example."""
    pool = stored_pool(job, "hidden")
    return {
        name: Alignment(
            Cosines([View(pool, np.asarray(stored_target(job, name)["hidden"], np.float32))]),
            job.tasks(name),
            "max",
        )
        for name in job.targets
    }


METHOD = Method(scores, stages, measure)

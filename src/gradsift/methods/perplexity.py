"""Highest loss of the base model first: what it knows least."""

from __future__ import annotations

import numpy as np

from gradsift.methods.base import Inputs, Method
from gradsift.methods.job import Job
from gradsift.pool.hidden_states import pool_stage, run_over_pool, stored_pool
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Ranking


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the pass of the base model over the pool, the same that `rds` needs."""
    return (pool_stage(inputs),)


def scores(job: Job) -> dict[str, Ranking]:
    """Return the mean negative log-likelihood of each example's supervised tokens."""
    losses = stored_pool(job, "loss")[:]
    return {name: Ranking(losses) for name in job.targets}


def facts(job: Job) -> dict[str, np.ndarray]:
    """Return the losses."""
    return {"loss": stored_pool(job, "loss")[:]}


METHOD = Method(scores, stages, run_over_pool, facts=facts)

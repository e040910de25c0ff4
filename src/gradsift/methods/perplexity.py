"""Highest loss of the base model first: what it knows least."""

from __future__ import annotations

from functools import partial

import numpy as np

from gradsift.config import Config
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.measurement import BASE_FORWARD
from gradsift.methods.work import Sizes, Work
from gradsift.pool.hidden_states import make_forward_measure
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Ranking


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the forward pass of the base model over the pool."""
    return (BASE_FORWARD.pool_stage(inputs, model=inputs.model_settings),)


def measure(job: Job) -> None:
    """Store the losses of the pool."""
    [stage], factory = stages(job.inputs), partial(make_forward_measure, job.models)
    BASE_FORWARD.measure_pool(job, stage, {"": lambda: factory})


def scores(job: Job) -> dict[str, Ranking]:
    """Return the mean negative log-likelihood of each example's supervised tokens."""
    losses = BASE_FORWARD.read_pool(job, "loss")[:]
    return {name: Ranking(losses) for name in job.targets}


def facts(job: Job) -> dict[str, np.ndarray]:
    """Return the losses."""
    return {"loss": BASE_FORWARD.read_pool(job, "loss")[:]}


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return the forward pass over the pool."""
    return [Work("pool pass", "forward", sizes.pool)]


METHOD = Method(scores, stages, measure, facts=facts, compares=False, work=work)

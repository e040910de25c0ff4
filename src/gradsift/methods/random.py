"""A seeded random order, the same for every target: what every method has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradsift.config import Config
from gradsift.methods.base import Method
from gradsift.methods.job import Job
from gradsift.scores.ranking import Ranking


def scores(job: Job) -> dict[str, Ranking]:
    """Return a random number for each example."""
    values = np.random.default_rng(job.config.random.seed).random(len(job.pool), np.float32)
    return {name: Ranking(values) for name in job.targets}


def settings(config: Config) -> Mapping[str, Any]:
    """Return the seed."""
    return config.random.model_dump()


METHOD = Method(scores, settings=settings, compares=False)

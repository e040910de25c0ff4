"""Most supervised tokens first."""

from __future__ import annotations

import numpy as np

from gradsift.methods.base import Method
from gradsift.methods.job import Job
from gradsift.scores.ranking import Ranking


def scores(job: Job) -> dict[str, Ranking]:
    """Return the number of supervised tokens, known since the encoding."""
    counts = job.pool.table(["num_supervised"])["num_supervised"].to_numpy().astype(np.float32)
    return {name: Ranking(counts) for name in job.targets}


METHOD = Method(scores, compares=False)

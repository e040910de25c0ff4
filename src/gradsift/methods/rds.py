"""RDS+: cosine of pooled hidden states of the base model (Ivison et al., 2025, arXiv 2503.01807).

An example is the mean of its last hidden states, the i-th token weighted by i; the most alike
target example counts. No warm-up, no gradient.
"""

from __future__ import annotations

from functools import partial

from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.measurement import Measurement
from gradsift.pool.hidden_states import prepare_forward
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View

_FORWARD = Measurement("base")  # `perplexity` reads the same pass over the pool


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the forward passes of the base model over targets and pool."""
    return _FORWARD.stages(inputs, model=inputs.model_settings)


def measure(job: Job) -> None:
    """Store the pooled hidden states of targets and pool."""
    _FORWARD.measure(job, stages(job.inputs), partial(prepare_forward, job.models))


def scores(job: Job) -> dict[str, Alignment]:
    """Return the largest cosine with a target example."""
    pool = _FORWARD.of_pool(job, "hidden")
    return {
        name: Alignment(
            Cosines([View(pool, _FORWARD.of_target(job, name, "hidden"))]), job.tasks(name), "max"
        )
        for name in job.targets
    }


METHOD = Method(scores, stages, measure)

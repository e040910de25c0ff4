"""RDS+: cosine of pooled hidden states of the base model (Ivison et al., 2025, arXiv 2503.01807).

An example is the mean of its last hidden states, the i-th token weighted by i; the most alike
target example counts. No warm-up, no gradient.
"""

from __future__ import annotations

from functools import partial

from gradsift.config import Config
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.measurement import BASE_FORWARD
from gradsift.methods.work import Sizes, Work
from gradsift.pool.hidden_states import make_forward_measure
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the forward passes of the base model over targets and pool."""
    return BASE_FORWARD.stages(inputs, model=inputs.model_settings)


def measure(job: Job) -> None:
    """Store the pooled hidden states of targets and pool."""
    BASE_FORWARD.measure(job, stages(job.inputs), partial(make_forward_measure, job.models))


def scores(job: Job) -> dict[str, Alignment]:
    """Return the largest cosine with a target example."""
    return BASE_FORWARD.nearest_cosines(job, "hidden")


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return the forward passes over targets and pool."""
    passes = {f"forward pass over {name}": own for name, own in sizes.targets.items()}
    return [
        Work(label, "forward", own) for label, own in (passes | {"pool pass": sizes.pool}).items()
    ]


METHOD = Method(scores, stages, measure, work=work)

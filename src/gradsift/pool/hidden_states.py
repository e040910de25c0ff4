"""One forward pass of the base model over pool or target, for the methods that need no gradient.

It leaves losses and pooled hidden states together: perplexity and rds share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from safetensors.numpy import load_file

from gradsift.data.encoding import Encoded
from gradsift.methods.base import Inputs
from gradsift.methods.job import Job
from gradsift.pool.examples import Measure, measure_target
from gradsift.pool.pool_pass import measure_pool
from gradsift.pool.shards import Stored
from gradsift.runs.stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_POOL = "base/pool"


def pool_stage(inputs: Inputs) -> Stage:
    """Return the stage that runs the base model over the pool."""
    return inputs.pool_pass(_POOL, model=inputs.model_facts)


def target_stage(inputs: Inputs, name: str) -> Stage:
    """Return the stage that runs it over a target."""
    settings, sources = {"model": inputs.model_facts}, (inputs.target(name),)
    return Stage(f"base/targets/{name}", settings, (_target_file(name),), sources)


def run_over_pool(job: Job) -> None:
    """Leave `loss` and `hidden` of every pool example.

    Raises:
        NumericsError: Naming the first example of which one is not finite.
    """
    with job.pool_stage(pool_stage(job.inputs)) as todo:
        if todo:
            measure_pool(job, _POOL, partial(_prepare, job))


def run_over_target(job: Job, name: str) -> None:
    """Leave `loss` and `hidden` of every target example."""
    with job.folder.stage(target_stage(job.inputs, name)) as todo:
        if todo:
            measure_target(job, name, job.path(_target_file(name)), partial(_prepare, job))


def stored_pool(job: Job, name: str) -> Stored:
    """Return `loss` or `hidden` of the pool."""
    return job.stored(_POOL, name)


def stored_target(job: Job, name: str) -> dict[str, object]:
    """Return `loss` and `hidden` of a target."""
    return dict(load_file(job.path(_target_file(name))))


def _target_file(name: str) -> str:
    return f"base/targets/{name}.safetensors"


def _prepare(job: Job) -> tuple[Measure, torch.device]:
    from gradsift.models.forward import run_forward

    model = job.models.base()

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        found = run_forward(model, examples, max_tokens)
        return {"loss": found.losses, "hidden": found.hidden.half()}

    return measure, model.device

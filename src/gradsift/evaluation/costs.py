"""What a method's measuring cost: seconds, tokens and floating-point operations."""

from __future__ import annotations

import json
from dataclasses import dataclass

from gradsift.methods.job import Job
from gradsift.methods.registry import METHODS
from gradsift.methods.work import Sizes
from gradsift.runs import layout
from gradsift.selection.stages import RunStages


@dataclass(frozen=True)
class Cost:
    """What it takes to score the pool by a method, from encoded data to scores.

    `seconds` as they were measured, wherever it ran. `tokens` that went through the base model, and
    the `flops` that follow from them (`Work.flops`): what the model does, not what the method
    computes besides it.
    """

    seconds: float
    tokens: int
    flops: float


def cost_of(job: Job, stages: RunStages) -> Cost:
    """Return what a method that has measured and scored cost.

    A stage that several methods share, such as the warm-up, counts for each of them. The seconds of
    a stage that was broken off and went on are those of all its parts; encoding is not counted.
    Target gradients that did not fit into memory and were computed again count in seconds alone.

    Raises:
        ModelError: If the base model's configuration is not there any more.
    """
    from gradsift.models.parameters import multiplied_parameters

    config, method = job.config, METHODS[job.config.method]
    manifests = job.folder.facts([*stages.measured, stages.scores]).values()
    works = method.work(config, Sizes.of(job, _ranks(job)))
    multiplied = multiplied_parameters(config.model) if works else 0
    adapter = _adapter_size(job, stages)
    return Cost(
        seconds=float(sum(manifest["seconds"] for manifest in manifests)),
        tokens=sum(work.num_tokens for work in works),
        flops=sum((work.flops(multiplied, adapter) for work in works), 0.0),
    )


def _ranks(job: Job) -> dict[str, int]:
    """Return the rank of each target's stored subspace, nothing for methods that have none."""
    if "gist" not in job.config.measuring:
        return {}
    files = {name: job.path(layout.spectrum(name)) for name in job.targets}
    spectra = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {name: max(f["rank"] for f in found.values()) for name, found in spectra.items()}


def _adapter_size(job: Job, stages: RunStages) -> int:
    """Return the parameters of the adapter that a method measured at, 0 without one."""
    from gradsift.models.parameters import adapter_parameters

    kept_whole = [stage.name for stage in stages.measured if not stage.keeps_parts]
    return max((adapter_parameters(job.folder.path / name) for name in kept_whole), default=0)

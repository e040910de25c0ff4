"""LESS: the direction that Adam would take for a pool example, against target gradients.

Xia, Malladi, Gururangan, Arora, Chen, 2024, arXiv 2402.04333. At the end of each epoch of a longer
warm-up, with Adam's moments m and v of that moment, a pool example's gradient g becomes

    (β₁ m + (1−β₁) g) / √(β₂ v + (1−β₂) g² + ε)

and target gradients stay as they are. Both are projected at random to a few thousand entries and
compared by cosine, weighted by the epoch's mean learning rate; the mean within a task counts, and
the best task. The pool's projections do not depend on the targets and are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from gradsift.config import Config
from gradsift.data.encoding import Encoded
from gradsift.errors import ConfigError, ModelError
from gradsift.methods.base import Inputs, Method
from gradsift.methods.job import Job
from gradsift.pool.examples import Measure, measure_target
from gradsift.pool.pool_pass import measure_pool
from gradsift.runs.layout import OPTIMIZER_STATE
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of the AdamW that trained the warm-up
_MOMENTS = ("exp_avg", "exp_avg_sq")


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up, the projected gradients of the targets, and those of the pool."""
    config = _with_own_warmup(inputs.config)
    warmup = inputs.warmup(config, "warmup" if config == inputs.config else "less/warmup")
    settings = config.less.model_dump()
    targets = [
        Stage(f"less/targets/{n}", settings, (f"less/targets/{n}",), (inputs.target(n), warmup))
        for n in config.data.targets
    ]
    return warmup, *targets, inputs.pool_pass("less/pool", warmup, **settings)


def measure(job: Job) -> None:
    """Leave adapters with Adam's moments, and the projected gradients of targets and pool.

    Raises:
        ModelError: Naming the parameter whose moments are missing or of another shape.
        NumericsError: If a gradient is not finite.
    """
    warmup, *targets, pool = stages(job.inputs)
    checkpoints = job.warm_up(warmup, _with_own_warmup(job.config))
    for name, stage in zip(job.targets, targets, strict=True):
        with job.folder.stage(stage) as todo:
            if todo:
                for checkpoint in checkpoints:
                    prepare = partial(_prepare, job, checkpoint, moments=False)
                    path = job.path(stage.name) / f"{checkpoint.label}.safetensors"
                    measure_target(job, name, path, prepare)
    with job.pool_stage(pool, [c.label for c in checkpoints]) as todo:
        if todo:
            for checkpoint in checkpoints:
                prepare = partial(_prepare, job, checkpoint)
                measure_pool(job, "less/pool", prepare, checkpoint.label)


def scores(job: Job) -> dict[str, Alignment]:
    """Return the cosines of projected gradients, mean within a task, best task."""
    checkpoints = job.checkpoints(stages(job.inputs)[0])

    def view(name: str, checkpoint: Checkpoint) -> View:
        target = load_file(job.path(f"less/targets/{name}") / f"{checkpoint.label}.safetensors")
        pool = job.stored("less/pool", "gradient", checkpoint.label)
        return View(pool, target["gradient"].astype(np.float32), checkpoint.weight)

    return {
        name: Alignment(Cosines([view(name, c) for c in checkpoints]), job.tasks(name), "mean")
        for name in job.targets
    }


METHOD = Method(scores, stages, measure)


def adam_direction(gradient: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """Return the direction that Adam would take with a gradient, given its moments."""
    first, second = _BETAS
    moved = first * mean + (1 - first) * gradient
    return moved / (second * square + (1 - second) * gradient.square() + _EPSILON).sqrt_()


def load_moments(model: PeftModel, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return Adam's two moments of every LoRA matrix, flattened, by the name of its block.

    Raises:
        ModelError: If there are none, or those of a parameter are missing, superfluous, or of
            another shape.
    """
    from gradsift.gradients.per_example import blocks

    file = path / OPTIMIZER_STATE
    if not file.exists():
        raise ModelError(
            f"{path} has no {OPTIMIZER_STATE}: LESS needs the moments that Adam had there. Let "
            "gradsift train the warm-up, or keep them with warmup.keep_optimizer=true"
        )
    state = {name: value for name, value in load_file(file).items() if name.endswith(_MOMENTS)}
    moments = {}
    for block, shape in blocks(model).items():
        layer, _, matrix = block.rpartition(".")
        parameter = f"base_model.model.{layer}.lora_{matrix}.weight"
        pair = [state.pop(f"{parameter}.{moment}", None) for moment in _MOMENTS]
        for moment, value in zip(_MOMENTS, pair, strict=True):
            if value is None or value.shape != shape:
                found = "missing" if value is None else f"{list(value.shape)}"
                raise ModelError(
                    f"{file} does not belong to the adapter beside it: {moment} of {parameter} is "
                    f"{found} there, expected {list(shape)}"
                )
        moments[block] = tuple(_on(model, value) for value in pair)
    if state:
        raise ModelError(
            f"{file} does not belong to the adapter beside it: it has {next(iter(state))}, which "
            "the adapter lacks"
        )
    return moments


def _on(model: PeftModel, value: np.ndarray | None) -> Tensor:
    import torch

    return torch.from_numpy(value).flatten().to(model.device, torch.float32)


def _with_own_warmup(config: Config) -> Config:
    """Return the settings with a warm-up of as many epochs as LESS has checkpoints."""
    if config.warmup.mode == "none":
        raise ConfigError(
            "method=less needs a warm-up: it measures with the moments that Adam has after one; "
            "leave --warmup none out"
        )
    if config.warmup.adapter is not None:
        return config
    own = {"epochs": config.less.checkpoints, "checkpoints": config.less.checkpoints}
    warmup = config.warmup.model_copy(update=own | {"keep_optimizer": True})
    return config.model_copy(update={"warmup": warmup})


def _prepare(
    job: Job, checkpoint: Checkpoint, moments: bool = True
) -> tuple[Measure, torch.device]:
    """Return what projects the gradients of examples, as Adam's directions or as they are."""
    from gradsift.gradients.gram import row_bytes
    from gradsift.gradients.memory import memory_budget
    from gradsift.gradients.random_projection import Projection

    model = job.models.at(checkpoint.path)
    adam = load_moments(model, checkpoint.path) if moments else None
    config = job.config.less
    projection = Projection(config.dimension, config.seed, model.device)
    rows_at_once = max(1, memory_budget(job.config.engine, model.device) // row_bytes(model))

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        import torch

        parts = [
            _project(model, examples[start : start + rows_at_once], max_tokens, projection, adam)
            for start in range(0, len(examples), rows_at_once)
        ]
        return {"gradient": torch.cat(parts)}

    return measure, model.device


def _project(
    model: PeftModel,
    examples: Sequence[Encoded],
    max_tokens: int,
    projection: object,
    adam: Mapping[str, tuple[Tensor, Tensor]] | None,
) -> Tensor:
    """Return the projected directions at length 1, in float16: half the disk, cosines to 1e-4."""
    import torch

    from gradsift.gradients.per_example import gradient_rows
    from gradsift.gradients.random_projection import Projection

    assert isinstance(projection, Projection)
    into = torch.zeros(len(examples), projection.dimension, device=model.device)
    first = 0
    for block, rows in gradient_rows(model, examples, max_tokens).items():
        directions = rows if adam is None else adam_direction(rows, *adam[block])
        projection.add(directions, first, into)
        first += rows.shape[1]
    return torch.nn.functional.normalize(into).half()

"""LESS: the direction that Adam would take for a pool example, against target gradients.

Xia, Malladi, Gururangan, Arora, Chen, 2024, arXiv 2402.04333. At the end of each epoch of a longer
warm-up, with Adam's moments m and v of that moment, a pool example's gradient g becomes

    (β₁ m + (1−β₁) g) / √(β₂ v + (1−β₂) g² + ε)

and target gradients stay as they are. Both are projected at random to a few thousand entries and
compared by cosine, weighted by the epoch's mean learning rate; the mean within a task counts, and
the best task. The pool's projections do not depend on the targets and are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from gradsift.config import Config, EngineConfig, WarmupConfig
from gradsift.data.encoding import Encoded
from gradsift.errors import ConfigError, ModelError
from gradsift.method_config import LessConfig
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.measurement import Measurement
from gradsift.methods.work import Sizes, Work, num_checkpoints, warm_up
from gradsift.pool.examples import Measure, MeasureFactory
from gradsift.pool.pool_pass import FactoriesByCheckpoint
from gradsift.runs import layout
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor

    from gradsift.models.cache import ModelCache

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of the AdamW that trained the warm-up
_MOMENTS = ("exp_avg", "exp_avg_sq")
_GRADIENTS = Measurement(layout.LESS, at_checkpoints=True)


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the warm-up, the projected gradients of the targets, and those of the pool."""
    config, own = inputs.config, _own_warmup(inputs.config)
    name = layout.WARMUP if own == config.warmup else layout.LESS_WARMUP
    warmup, settings = inputs.make_warmup_stage(own, name), config.less.model_dump()
    return warmup, *_GRADIENTS.stages(inputs, warmup, **settings)


def measure(job: Job) -> None:
    """Store adapters with Adam's moments, and the projected gradients of targets and pool.

    Raises:
        ModelError: Naming the parameter whose moments are missing or of another shape.
        NumericsError: If a gradient is not finite.
    """
    warmup, *targets, pool = stages(job.inputs)
    checkpoints = job.warm_up(warmup, _own_warmup(job.config))

    def factories(with_moments: bool) -> FactoriesByCheckpoint:
        return {c.label: partial(_factory, job, c.path, with_moments) for c in checkpoints}

    _GRADIENTS.measure_targets(job, targets, factories(with_moments=False))
    _GRADIENTS.measure_pool(job, pool, factories(with_moments=True))


def scores(job: Job) -> dict[str, Alignment]:
    """Return the cosines of projected gradients, mean within a task, best task."""
    warmup, *_ = stages(job.inputs)
    checkpoints = job.checkpoints(warmup.name)

    def view(name: str, checkpoint: Checkpoint) -> View:
        pool = _GRADIENTS.read_pool(job, "gradient", checkpoint.label)
        target = _GRADIENTS.read_target(job, name, "gradient", checkpoint.label)
        return View(pool, target, checkpoint.weight)

    return {
        name: Alignment(Cosines([view(name, c) for c in checkpoints]), job.tasks(name), "mean")
        for name in job.targets
    }


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return its warm-up, and the random projections of targets and pool at every checkpoint."""
    warmup, directions = _own_warmup(config), config.less.dimension
    measured = {f"gradients of {name}": own for name, own in sizes.targets.items()}
    measured["pool pass"] = sizes.pool
    passes, kept = num_checkpoints(warmup), 2 * directions  # in float16
    return [
        *warm_up(warmup, sizes),
        *(
            Work(label, "random projection", amount, passes, directions, kept)
            for label, amount in measured.items()
        ),
    ]


METHOD = Method(scores, stages, measure, work=work)


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

    file = path / layout.OPTIMIZER_STATE
    if not file.exists():
        raise ModelError(
            f"{path} has no {layout.OPTIMIZER_STATE}: LESS needs the moments that Adam had there. "
            "Let gradsift train the warm-up, or keep them with warmup.keep_optimizer=true"
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


def _own_warmup(config: Config) -> WarmupConfig:
    """Return the settings of a warm-up of as many epochs as LESS has checkpoints."""
    if config.warmup.mode == "none":
        raise ConfigError(
            "method=less needs a warm-up: it measures with the moments that Adam has after one; "
            "leave --warmup none out"
        )
    if config.warmup.adapter is not None:
        return config.warmup
    own = {"epochs": config.less.checkpoints, "checkpoints": config.less.checkpoints}
    return config.warmup.model_copy(update=own | {"keep_optimizer": True})


def _factory(job: Job, adapter: Path, with_moments: bool) -> MeasureFactory:
    args = (job.models, adapter, job.config.less, job.config.engine, with_moments)
    return partial(make_random_projection_measure, *args)


def make_random_projection_measure(
    models: ModelCache,
    adapter: Path,
    settings: LessConfig,
    engine: EngineConfig,
    with_moments: bool,
) -> tuple[Measure, torch.device]:
    """Return what projects the gradients of examples, as Adam's directions or as they are."""
    import torch
    from torch.nn.functional import normalize

    from gradsift.gradients.gram import row_bytes
    from gradsift.gradients.memory import memory_budget
    from gradsift.gradients.random_projection import Projection, project_at_random

    model = models.with_adapter(adapter)
    adam = load_moments(model, adapter) if with_moments else None
    projection = Projection(settings.dimension, settings.seed, model.device)
    rows_at_once = max(1, memory_budget(engine, model.device) // row_bytes(model))

    def direction(block: str, gradient: Tensor) -> Tensor:
        return gradient if adam is None else adam_direction(gradient, *adam[block])

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        # at length 1, in float16: half the disk, cosines to 1e-4
        at_once = len(examples) if projection.in_kernel else rows_at_once
        parts = [
            project_at_random(
                model, examples[start : start + at_once], max_tokens, projection, direction
            )
            for start in range(0, len(examples), at_once)
        ]
        return {"gradient": torch.cat([normalize(part).half() for part in parts])}

    return measure, model.device

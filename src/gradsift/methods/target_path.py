"""Target path: the share of an example's loss that goes when the model trains on the target.

Yang, He, Cheng, 2026, arXiv 2605.09404. A small adapter is trained briefly on the target's own
examples. With ℓ the loss of a pool example at the base model and ℓ′ that with the adapter,

    score = (ℓ − ℓ′) / max(ℓ, 10⁻³)

Two forward passes over the pool, the first of which `rds` and `perplexity` share; no gradient of a
pool example is formed, and losses alone are stored.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gradsift.config import Config, LoraConfig, WarmupConfig
from gradsift.data.encoded import EncodedSet
from gradsift.executors.processes import is_first
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.measurement import BASE_FORWARD
from gradsift.methods.work import Sizes, Work
from gradsift.pool.examples import MeasureFactory, measure_examples
from gradsift.pool.hidden_states import make_forward_measure, make_loss_measure
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Ranking

if TYPE_CHECKING:
    from gradsift.models.cache import ModelCache
    from gradsift.models.tracking import Trackers

logger = logging.getLogger(__name__)

_HARDLY_FALLS = 0.02  # of a loss: with less, what a pool example's loses is mostly noise
_LOSS_BYTES = 4  # float32
_SMALLEST_LOSS = 1e-3  # nats: what is known by heart already has no share to lose, only rounding


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the base model's pass over the pool; for each target its warm-up and another pass."""
    base = BASE_FORWARD.pool_stage(inputs, model=inputs.model_settings)
    paths = [stage for name in inputs.target_names for stage in _path(inputs, name)]
    return base, *paths


def measure(job: Job) -> None:
    """Store the losses of the pool before and after training on each target.

    Raises:
        NumericsError: If a loss stops being finite.
    """
    [base, *_] = stages(job.inputs)
    before = partial(make_forward_measure, job.models)
    BASE_FORWARD.measure_pool(job, base, {"": lambda: before})
    for name in job.targets:
        _measure_path(job, name)


def scores(job: Job) -> dict[str, Ranking]:
    """Return the share of each example's loss that training on the target takes away."""
    before = BASE_FORWARD.read_pool(job, "loss")[:]
    return {
        name: Ranking(
            normalised_drop(before, job.pool_pass(layout.losses_after(name)).read("loss")[:])
        )
        for name in job.targets
    }


def facts(job: Job) -> dict[str, np.ndarray]:
    """Return the losses at the base model."""
    return {"loss": BASE_FORWARD.read_pool(job, "loss")[:]}


def work(config: Config, sizes: Sizes) -> list[Work]:
    """Return the base model's pass over the pool; for each target its training and another pass."""
    own, found = config.target_path, [Work("pool pass", "forward", sizes.pool)]
    for name, amount in sizes.targets.items():
        steps = own.steps * min(own.batch_size, amount.num_examples)
        found.append(Work(f"training on {name}", "training", amount.of_part(steps)))
        found.append(Work(f"pool pass for {name}", "forward", sizes.pool, kept=_LOSS_BYTES))
    return found


METHOD = Method(scores, stages, measure, facts=facts, compares=False, work=work)


def normalised_drop(
    before: Float[np.ndarray, " example"], after: Float[np.ndarray, " example"]
) -> Float[np.ndarray, " example"]:
    """Return (before − after) / max(before, 10⁻³), losses in nats: 1 at best, 0 without a change.

    >>> normalised_drop(np.array([2.0, 0.0]), np.array([1.5, 0.0])).tolist()
    [0.25, 0.0]
    """
    return (before - after) / np.maximum(before, np.float32(_SMALLEST_LOSS))


def train_on_target(
    config: Config, models: ModelCache, target: EncodedSet, directory: Path, trackers: Trackers
) -> None:
    """Store in `directory` an adapter trained on a target's own examples, and the log.

    Of processes that train together, the first writes.

    Raises:
        ModelError: If there are no such layers.
        NumericsError: If the loss stops being finite.
    """
    from gradsift.models.adapters import save_adapter
    from gradsift.models.training import train

    own = config.target_path
    examples = target.examples(np.arange(len(target)))
    with models.with_fresh_adapter(_lora(config), own.seed) as model:
        log = train(
            model, examples, _training(config),
            steps=own.steps, seed=own.seed, trackers=trackers,
        )  # fmt: skip
        if not is_first():
            return
        save_adapter(model, directory)
    write_atomically(directory / layout.TRAINING_LOG, json.dumps(log, indent=1).encode())


def _measure_path(job: Job, target: str) -> None:
    """Store the adapter of a target and the losses of the pool with it."""
    warmup, losses = _path(job.inputs, target)
    adapter = job.path(warmup.name)
    with job.folder.stage(warmup) as todo:
        if todo:
            examples = job.targets[target]
            given = (job.config, job.models, examples, adapter, job.trackers(warmup.name))
            job.train(partial(train_on_target, *given), adapter)
            _say_how_far(job, target, adapter)
    after = partial(make_loss_measure, job.models, adapter)
    job.pool_pass(losses.name).run(losses, {"": lambda: after})


def _say_how_far(job: Job, target: str, adapter: Path) -> None:
    """Say how far the target's own loss fell, and how to make more of it where it hardly did."""
    examples, engine = job.targets[target], job.config.engine

    def mean_loss(factory: MeasureFactory) -> float:
        work = partial(measure_examples, examples, np.arange(len(examples)), factory, engine)
        return float(job.call(work)["loss"].mean())

    before = mean_loss(partial(make_forward_measure, job.models))
    after = mean_loss(partial(make_loss_measure, job.models, adapter))
    logger.info("%s: the loss of its own examples went from %.3f to %.3f", target, before, after)
    if before - after < _HARDLY_FALLS * before:
        logger.warning(
            "%s: training on it changed the loss of its own examples by %.1f %% only, and scores "
            "say little; raise target_path.learning_rate or target_path.steps",
            target,
            100 * (after - before) / before,
        )


def _path(inputs: Inputs, target: str) -> tuple[Stage, Stage]:
    """Return the stages that train on a target and measure the pool with what came of it."""
    config, name = inputs.config, inputs.at(layout.target_warmup(target))
    rest = {"micro_batch_tokens", "warmup_ratio", "weight_decay"}
    settings: dict[str, Any] = {"model": inputs.model_settings, "lora": _lora(config).model_dump()}
    settings |= config.warmup.model_dump(include=rest) | config.target_path.model_dump()
    warmup = Stage(name, settings, (name,), (inputs.target_stage(target),))
    return warmup, inputs.make_pool_pass_stage(layout.losses_after(target), warmup)


def _lora(config: Config) -> LoraConfig:
    """Return the run's adapter at another rank and the same scale (alpha over rank)."""
    lora, rank = config.lora, config.target_path.rank
    return lora.model_copy(update={"rank": rank, "alpha": lora.alpha / lora.rank * rank})


def _training(config: Config) -> WarmupConfig:
    """Return how an adapter is trained: as the warm-up, but for rate and batch size."""
    own = config.target_path.model_dump(include={"learning_rate", "batch_size"})
    return config.warmup.model_copy(update=own)

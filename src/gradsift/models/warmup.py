"""Warm-up: short LoRA training on a random part of the pool, before gradients mean anything."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from gradsift.config import LoraConfig, WarmupConfig
from gradsift.data.encoded import EncodedSet
from gradsift.executors.processes import is_first
from gradsift.models.adapters import save_adapter
from gradsift.models.cache import ModelCache
from gradsift.models.checkpoints import write_checkpoints
from gradsift.models.tracking import NOWHERE, Trackers
from gradsift.models.training import optimizer_state, steps_per_epoch, train
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically

logger = logging.getLogger(__name__)

_HARDLY_MOVES = 5e-4  # of a weight; the paper's warm-up could move one by 2e-3


def warm_up(
    warmup: WarmupConfig,
    lora: LoraConfig,
    models: ModelCache,
    pool: EncodedSet,
    directory: Path,
    trackers: Trackers = NOWHERE,
) -> None:
    """Store in `directory` the adapters at which gradients are measured, and `checkpoints.json`.

    Trained on a random part of the pool (one adapter for each of the last epochs, weighted by its
    mean learning rate), or fresh, or copied from an existing one, as the configuration says. Of
    processes that train together, the first writes.

    Raises:
        ModelError: If the model or the adapter given cannot be used.
        NumericsError: If the training loss stops being finite.
    """
    if warmup.adapter is not None:
        given, kept = Path(warmup.adapter), directory / layout.GIVEN_ADAPTER
        save_adapter(models.with_adapter(given), kept)
        # as they came: in the model they have its precision
        for name in (SAFETENSORS_WEIGHTS_NAME, layout.OPTIMIZER_STATE):
            if (given / name).exists():
                shutil.copyfile(given / name, kept / name)
        write_checkpoints(directory, {layout.GIVEN_ADAPTER: 1.0})
        return
    with models.with_fresh_adapter(lora, warmup.seed) as model:
        _train(warmup, model, pool, directory, trackers)


def _train(
    warmup: WarmupConfig,
    model: PeftModel,
    pool: EncodedSet,
    directory: Path,
    trackers: Trackers,
) -> None:
    """Train this fresh adapter and store it after the last epochs; or store just the fresh one."""
    if warmup.mode == "none":
        save_adapter(model, directory / layout.FRESH_ADAPTER)
        write_checkpoints(directory, {layout.FRESH_ADAPTER: 1.0})
        return
    rng = np.random.default_rng(warmup.seed)
    count = max(1, round(warmup.fraction * len(pool)))
    rows = np.sort(rng.choice(len(pool), size=count, replace=False))
    rates: dict[str, float] = {}

    def keep(epoch: int, mean_rate: float, optimizer: torch.optim.Optimizer) -> None:
        if epoch <= warmup.epochs - warmup.checkpoints or not is_first():
            return
        folder = directory / layout.epoch(epoch)
        save_adapter(model, folder)
        if warmup.keep_optimizer:
            save_file(optimizer_state(model, optimizer), folder / layout.OPTIMIZER_STATE)
        rates[folder.name] = mean_rate

    steps = steps_per_epoch(count, warmup) * warmup.epochs
    logger.info("warm-up on %d examples, optimizer steps: %d", count, steps)
    furthest = steps * warmup.learning_rate  # AdamW moves a weight by about the rate at a step
    if furthest < _HARDLY_MOVES:
        logger.warning(
            "in %d steps at %g no weight moves by much more than %.0e: the gradients will be those "
            "of an untrained adapter; raise warmup.learning_rate or warmup.epochs, or lower "
            "warmup.batch_size",
            steps,
            warmup.learning_rate,
            furthest,
        )
    examples = pool.examples(rows)
    log = train(
        model, examples, warmup, steps=steps, seed=warmup.seed, on_epoch=keep, trackers=trackers
    )
    if not is_first():
        return
    write_atomically(directory / layout.TRAINING_LOG, json.dumps(log, indent=1).encode())
    write_checkpoints(directory, rates)

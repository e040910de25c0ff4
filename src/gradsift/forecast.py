"""What a run will take, from a few batches of each of its stages: `gradsift plan`.

Pool and targets are encoded whole, as `select` would, and kept. Everything else is done on a
sample, at the true sizes of model, adapter and basis, and scaled up by tokens.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from gradsift.config import Config
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.errors import ConfigError, translate_os_errors
from gradsift.gradients.subspace import fit_subspace
from gradsift.pipeline import check_settings, configure, encode
from gradsift.runs import layout
from gradsift.runs.opening import open_run
from gradsift.runs.provenance import peak_memory
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.selection.stages import RunStages

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

_TARGET_SAMPLE = 128  # examples of each target, from which its rank is guessed
_POOL_SAMPLE = 1024  # examples of the pool, of which as many are measured as time allows
_POOL_SECONDS = 10.0
_TRAIN_BATCHES = 8
_SCORED_SAMPLE = 4096
_SCORE_BYTES = 80  # of a row of scores.parquet for one target, as found on real pools


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    `seconds` by stage; `host_memory`, `device_memory` (of the pool pass; 0 without a GPU) and
    `disk` in bytes; `ranks` by target, guessed from a part of it where it is large.
    """

    num_pool: int
    num_tokens: int
    batch_tokens: int
    ranks: Mapping[str, int]
    seconds: Mapping[str, float]
    host_memory: int
    device_memory: int
    disk: int


def plan(**given: Any) -> Forecast:
    """Return what `select` with these arguments will take, after measuring a few batches.

    The encoded pool and targets are left in the run folder, where `select` finds them.

    Example:
        >>> forecast = gradsift.plan(                           # doctest: +SKIP
        ...     model="Qwen/Qwen2.5-1.5B", pool="data/*.jsonl",
        ...     target={"gsm8k": "gsm8k_dev.jsonl"}, output_dir="runs/gsm8k")
        >>> sum(forecast.seconds.values()) / 3600               # doctest: +SKIP

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    output_dir, strict = given.pop("output_dir"), given.pop("strict", False)
    return forecast(configure(**given), output_dir, strict)


@translate_os_errors()
def forecast(config: Config, output_dir: str | Path, strict: bool = False) -> Forecast:
    """Return what a whole configuration will take; see `plan`.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    if config.method != "gist":
        raise ConfigError(f"plan forecasts the method gist alone, found method={config.method}")
    check_settings(config)
    stages = RunStages.of(config)
    with open_run(output_dir) as folder, tempfile.TemporaryDirectory() as scratch:
        folder.prepare(stages.inputs.data_stages.values())
        job = encode(stages, folder, strict)
        pool, targets = job.pool, job.targets
        facts = folder.facts(stages.inputs.data_stages.values())
        seconds = {"encoding": float(sum(manifest["seconds"] for manifest in facts.values()))}
        unloaded = psutil.Process().memory_info().rss
        seconds["warm-up"], adapter = _try_warm_up(config, pool, Path(scratch))
        measured = _try_passes(config, pool, targets, adapter)
        seconds.update(measured.seconds)
        rank = sum(measured.ranks.values())
        seconds["scores"] = _try_scores(config, targets, measured.ranks, len(pool))
        num_checkpoints = config.warmup.checkpoints
        disk = _size(folder.path / layout.ENCODED) + num_checkpoints * (
            len(pool) * (4 * rank + 8)
            + _size(adapter)
            + sum(16 * len(targets[name]) * k for name, k in measured.ranks.items())
        )
        return Forecast(
            num_pool=len(pool),
            num_tokens=int(_num_tokens(pool).sum()),
            batch_tokens=measured.batch_tokens,
            ranks=measured.ranks,
            seconds=seconds,
            # scoring holds a target's coordinates, and a copy of unit length
            host_memory=max(peak_memory(), unloaded + 8 * len(pool) * rank * num_checkpoints),
            device_memory=measured.device_memory,
            disk=disk + _SCORE_BYTES * len(pool) * len(targets),
        )


@dataclass(frozen=True)
class _Measured:
    seconds: Mapping[str, float]
    ranks: Mapping[str, int]
    batch_tokens: int
    device_memory: int


def _try_warm_up(config: Config, pool: EncodedSet, scratch: Path) -> tuple[float, Path]:
    """Return the seconds that the warm-up will take, and an adapter to go on with."""
    from gradsift.models.adapters import save_adapter
    from gradsift.models.loading import load_base
    from gradsift.models.lora import attach_lora
    from gradsift.models.training import steps_per_epoch, train

    warmup = config.warmup
    if warmup.adapter is not None:
        return 0.0, Path(warmup.adapter)
    model = attach_lora(load_base(config.model), config.lora, warmup.seed)
    seconds = 0.0
    if warmup.mode == "train":
        micro = min(warmup.micro_batch_size, warmup.batch_size)
        settings = warmup.model_copy(update={"batch_size": micro})
        rows = np.random.default_rng(warmup.seed).permutation(len(pool))
        first, rest = (
            pool.examples(rows[: micro * batches]) for batches in (1, 1 + _TRAIN_BATCHES)
        )
        took = []
        for examples in (first, first, rest):  # the first time pays for what is set up once
            started = time.perf_counter()
            steps = steps_per_epoch(len(examples), settings)
            train(model, examples, settings, steps=steps, seed=0, label="trying the warm-up")
            took.append(time.perf_counter() - started)
        done = math.ceil(len(rest) / micro) - 1
        total = math.ceil(warmup.fraction * len(pool) / micro) * warmup.epochs
        seconds = took[1] + total * max(took[2] - took[1], 0) / max(done, 1)
    save_adapter(model, scratch / "adapter")
    return seconds, scratch / "adapter"


def _try_passes(
    config: Config, pool: EncodedSet, targets: Mapping[str, EncodedSet], adapter: Path
) -> _Measured:
    """Measure a part of every target and of the pool, with a basis of the expected size."""
    import torch
    from accelerate.utils.memory import clear_device_cache

    from gradsift.gradients.basis import fitting_basis
    from gradsift.gradients.batch_size import find_batch_tokens, probe
    from gradsift.gradients.gram import row_bytes
    from gradsift.gradients.memory import memory_budget
    from gradsift.gradients.projection import project
    from gradsift.models.adapters import load_adapter
    from gradsift.models.loading import load_base

    model = load_adapter(load_base(config.model), adapter)
    rng, checkpoints = np.random.default_rng(0), config.warmup.checkpoints
    memory = memory_budget(config.engine, model.device)
    seconds: dict[str, float] = {}
    ranks: dict[str, int] = {}
    parts: list[tuple[list[Encoded], np.ndarray]] = []
    for name, target in targets.items():
        rows = rng.permutation(len(target))[:_TARGET_SAMPLE]
        examples = target.examples(rows)
        ranks[name], took = _try_target(config, model, examples, len(target))
        tokens = _num_tokens(target)
        # where not all rows fit, those after each block of them are computed again
        num_blocks = math.ceil(len(target) * row_bytes(model) / memory)
        took *= checkpoints * (1 + num_blocks) / 2
        seconds[f"subspace of {name}"] = took * tokens.sum() / tokens[rows].sum()
        parts.append((examples, rng.normal(size=(len(examples), ranks[name]))))
    started = time.perf_counter()
    basis = fitting_basis(model, parts, config.engine)
    building = (time.perf_counter() - started) * sum(map(len, targets.values()))
    building *= checkpoints / sum(len(examples) for examples, _ in parts)
    tokens = _num_tokens(pool)
    measure = partial(project, model, basis=basis)
    max_tokens = find_batch_tokens(measure, tokens, config.engine, model.device)
    peak = 0
    if model.device.type == "cuda":  # what failed in the search for the batch size is not to count
        clear_device_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
        probe(measure, tokens, max_tokens)
        peak = torch.cuda.max_memory_allocated(model.device)
    rate = _tokens_per_second(model, pool, basis, max_tokens)
    seconds["pool pass"] = building + checkpoints * tokens.sum() / rate
    return _Measured(seconds, ranks, max_tokens, peak)


def _try_target(
    config: Config, model: PeftModel, examples: Sequence[Encoded], num_examples: int
) -> tuple[int, float]:
    """Return the rank that a target is expected to have, and the seconds for this part of it."""
    from gradsift.gradients.gram import fitting_gram

    started = time.perf_counter()
    gram = fitting_gram(model, examples, config.engine)
    took = time.perf_counter() - started
    dtype = str(model.dtype).removeprefix("torch.")
    if isinstance(config.gist.rank, int):
        return config.gist.rank, took
    rank = fit_subspace(gram, config.gist.rank, dtype).rank
    if num_examples == len(examples):
        return rank, took
    half = len(examples) // 2  # as it grew from half of them to all, so it is taken to go on
    before = fit_subspace(gram[:half, :half], config.gist.rank, dtype).rank
    power = min(max(math.log2(rank / before), 0.0), 1.0)
    return min(num_examples, round(rank * (num_examples / len(examples)) ** power)), took


def _tokens_per_second(model: PeftModel, pool: EncodedSet, basis: Any, max_tokens: int) -> float:
    """Return the speed of the pool pass over batches drawn from the whole pool."""
    from gradsift.gradients.projection import project
    from gradsift.models.batches import lengths_of, plan_batches

    rng = np.random.default_rng(0)
    examples = pool.examples(rng.permutation(len(pool))[:_POOL_SAMPLE])
    groups = plan_batches(lengths_of(examples), max_tokens)
    groups = [groups[i] for i in rng.permutation(len(groups))]
    num_tokens, seconds = 0, 0.0
    for number, group in enumerate([groups[0], *groups]):  # the first batch is not counted
        batch = [examples[i] for i in group]
        started = time.perf_counter()
        project(model, batch, max_tokens, basis).losses.cpu()
        if number:
            seconds += time.perf_counter() - started
            num_tokens += sum(len(example.input_ids) for example in batch)
        if seconds > _POOL_SECONDS:
            break
    return num_tokens / seconds


def _try_scores(
    config: Config, targets: Mapping[str, EncodedSet], ranks: Mapping[str, int], num_pool: int
) -> float:
    """Return the seconds that scoring the pool will take, from made-up coordinates."""
    rng, count = np.random.default_rng(0), min(num_pool, _SCORED_SAMPLE)
    started = time.perf_counter()
    for name, target in targets.items():
        made = rng.normal(size=(count + len(target), ranks[name])).astype(np.float32)
        tasks = target.table(["task"])["task"].to_pylist()
        cosines = Cosines([View(made[:count], made[count:])])
        Alignment(cosines, tasks, config.gist.aggregation).scores()
    return (time.perf_counter() - started) * config.warmup.checkpoints * num_pool / count


def _num_tokens(encoded: EncodedSet) -> np.ndarray:
    return encoded.table(["num_tokens"])["num_tokens"].to_numpy()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

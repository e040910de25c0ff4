"""What a run will take, from a few batches of each of its stages: `gradsift plan`.

Pool and targets are encoded whole, as `select` would, and kept. Everything else is tried on a
sample, at the true sizes of model, adapter and directions (`trials.py`), and scaled up to the work
that the method says it has.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from gradsift.config import Config
from gradsift.errors import ConfigError, translate_os_errors
from gradsift.methods.job import Job
from gradsift.methods.registry import METHODS
from gradsift.methods.work import Sizes, Work
from gradsift.pipeline import check_settings, configure, encode
from gradsift.runs import layout
from gradsift.runs.opening import locked_run
from gradsift.runs.provenance import peak_memory
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.selection.stages import RunStages
from gradsift.trials import Trials

if TYPE_CHECKING:
    from gradsift.batch_effect import BatchEffect

logger = logging.getLogger(__name__)

_SCORED_SAMPLE = 4096
_SCORE_BYTES = 80  # of a row of scores.parquet for one target, as found on real pools
_PICKING_BYTES = 190  # of a pool example in memory while picks are made, as found on real pools


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    `seconds` by stage; `host_memory`, `device_memory` (of the pool pass; 0 without a GPU) and
    `disk` in bytes; `ranks` by target, guessed from a part of it where it is large, for methods
    that have any; `batch_tokens` of the pool pass, 0 where the model has none to do;
    `batch_effect`: how far scores move between batches, where that was asked for.

    Examples:
        >>> forecast = gradsift.plan(                           # doctest: +SKIP
        ...     model="Qwen/Qwen2.5-1.5B", pool="data/*.jsonl",
        ...     target={"gsm8k": "gsm8k_dev.jsonl"}, output_dir="runs/gsm8k")
        >>> forecast.disk < forecast.host_memory                # doctest: +SKIP
        True
    """

    method: str
    num_pool: int
    num_tokens: int
    batch_tokens: int
    ranks: Mapping[str, int]
    seconds: Mapping[str, float]
    host_memory: int
    device_memory: int
    disk: int
    batch_effect: BatchEffect | None = None


def plan(**given: Any) -> Forecast:
    """Return what `select` with these arguments will take, after measuring a few batches.

    The encoded pool and targets are left in the run folder, where `select` finds them. With
    `check=True` it is also measured how far scores move with what shares an example's batch.

    Examples:
        >>> forecast = gradsift.plan(                           # doctest: +SKIP
        ...     model="Qwen/Qwen2.5-1.5B", pool="data/*.jsonl",
        ...     target={"gsm8k": "gsm8k_dev.jsonl"}, output_dir="runs/gsm8k")
        >>> forecast.seconds["pool pass"] > 0                   # doctest: +SKIP
        True

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    output_dir = given["output_dir"]
    strict, check = given.pop("strict", False), given.pop("check", False)
    return forecast(configure(**given), output_dir, strict, check)


@translate_os_errors()
def forecast(
    config: Config, output_dir: str | Path, strict: bool = False, check: bool = False
) -> Forecast:
    """Return what a whole configuration will take; see `plan`.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    check_settings(config)
    if config.index.path is not None:
        raise ConfigError("a run that asks an index makes no pass: there is nothing to plan")
    if check:
        _check_method(config.method)
    stages = RunStages.of(config)
    with locked_run(output_dir) as folder, tempfile.TemporaryDirectory() as scratch:
        folder.prepare(stages.inputs.data_stages.values())
        job = encode(stages, folder, strict)
        facts = folder.facts(stages.inputs.data_stages.values())
        seconds = {"encoding": float(sum(manifest["seconds"] for manifest in facts.values()))}
        trials = Trials(job, Path(scratch))
        found = _try_method(job, trials, seconds)
        if not check:
            return found
        adapter = trials.adapter
        del trials  # and its bases: the check loads models of its own
        job.models.release()
        from gradsift.batch_effect import measure_batch_effect

        return replace(found, batch_effect=measure_batch_effect(job, adapter, found.batch_tokens))


def _check_method(method: str) -> None:
    """Find out whether the check of batches knows a method.

    Raises:
        ConfigError: If it is not `gist`.
    """
    if method != "gist":
        raise ConfigError(
            f"plan --check knows the scores of --method gist alone, found {method!r}; leave "
            "--check out, or check with --method gist: less, cosine and influence take the same "
            "gradients at their adapters"
        )


def _try_method(job: Job, trials: Trials, seconds: dict[str, float]) -> Forecast:
    """Return the forecast of what follows the encoding, which took these seconds."""
    config, unloaded = job.config, psutil.Process().memory_info().rss
    ranks = trials.ranks() if "gist" in config.measuring else {}
    sizes = Sizes.of(job, ranks)
    works = METHODS[config.method].work(config, sizes)
    for work in works:
        seconds[work.label] = seconds.get(work.label, 0.0) + trials.seconds(work)
    kept = {work: _kept(work, trials) for work in works}
    if works:
        seconds["scores"] = _try_scores(job, works, kept)
    speed = next(iter(trials.pool_speeds.values()), None)
    picking = len(job.pool) * (_PICKING_BYTES + _columns_bytes(config, sizes))
    held = _held_rows(works, trials)
    on_device = speed.device_memory if speed else 0
    return Forecast(
        method=config.method,
        num_pool=len(job.pool),
        num_tokens=sizes.pool.num_tokens,
        batch_tokens=speed.batch_tokens if speed else 0,
        ranks=ranks,
        seconds=seconds,
        host_memory=max(peak_memory() + (0 if on_device else held), unloaded + picking),
        device_memory=on_device and on_device + held,
        disk=_disk(job, works, kept, trials),
    )


def _kept(work: Work, trials: Trials) -> int:
    """Return the bytes that are stored of each example of a piece of work, over all passes."""
    keeps_hidden = work.kind == "forward" and not work.kept
    return work.passes * (trials.bytes_of_hidden if keeps_hidden else work.kept)


def _held_rows(works: Sequence[Work], trials: Trials) -> int:
    """Return the bytes of whole gradients that wait for their random projection."""
    if any(work.kind == "random projection" for work in works):
        return trials.rows_at_once * trials.row_bytes
    return 0


def _columns_bytes(config: Config, sizes: Sizes) -> int:
    """Return the bytes of a pool example in the columns that a policy picks from."""
    return 4 * (1 if config.policy.strategy == "top" else sizes.all_targets.num_examples)


def _disk(job: Job, works: Sequence[Work], kept: Mapping[Work, int], trials: Trials) -> int:
    """Return the bytes of the run folder: data, what is stored of examples, scores, adapters.

    Of adapters those at which gradients are measured.
    """
    disk = _size(job.path(layout.ENCODED)) + _SCORE_BYTES * len(job.pool) * len(job.targets)
    for work in works:
        disk += work.amount.num_examples * kept[work]
    measured = [work for work in works if work.directions]
    if measured:
        # LESS keeps Adam's two moments beside each adapter
        copies = 3 if "less" in job.config.measuring else 1
        disk += copies * max(work.passes for work in measured) * _size(trials.adapter)
    return disk


def _try_scores(job: Job, works: Sequence[Work], kept: Mapping[Work, int]) -> float:
    """Return the seconds that scoring the pool will take, from made-up rows of the true width."""
    pool_pass = works[-1]
    passes, num_targets = pool_pass.passes, len(job.targets)
    width = pool_pass.directions or kept[pool_pass] // 2
    if pool_pass.kind == "projection":  # each target has its own directions
        width = max(1, width // num_targets)
    rng, count = np.random.default_rng(0), min(len(job.pool), _SCORED_SAMPLE)
    started = time.perf_counter()
    for name, target in job.targets.items():
        made = rng.normal(size=(count + len(target), width)).astype(np.float32)
        cosines = Cosines([View(made[:count], made[count:])])
        Alignment(cosines, job.tasks(name), job.config.gist.aggregation).scores()
    return (time.perf_counter() - started) * passes * len(job.pool) / count


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

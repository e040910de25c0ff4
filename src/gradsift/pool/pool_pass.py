"""The pass over the pool: shard by shard, wherever there are workers, and what a worker does.

A worker measures its shard window by window: batches are formed among the examples of a window
alone, so that neither the size of shards nor the number of workers changes a bit. While the device
works on a window, one thread reads the next and another writes the shard before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gradsift.data.encoding import Encoded
from gradsift.methods.job import Job
from gradsift.pool.examples import Prepare, check_finite
from gradsift.pool.shards import Shard, facts_of, find_damage, save_shard
from gradsift.progress import track

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_BATCH_TOKENS = "batch_tokens"


def measure_pool(job: Job, stage: str, prepare: Prepare, label: str = "") -> None:
    """Measure the whole pool, shard by shard, for a stage; what is there is not done again.

    `label`: that of the checkpoint at which it is measured, if there are any.

    Raises:
        NumericsError: Naming the first example of which something is not finite.
    """
    directory = job.path(stage) / label
    directory.mkdir(parents=True, exist_ok=True)
    shards = job.shards(stage, label)
    missing = job.missing_shards(shards)
    if not missing:
        return
    starts = {shard.start for shard in missing}
    stored = [shard for shard in shards if shard.start not in starts]
    if stored:
        logger.info("%d of %d shards are there already", len(stored), len(shards))
    known = facts_of(stored[-1])[_BATCH_TOKENS] if stored else None
    with track(f"{stage}/{label}".rstrip("/"), sum(map(len, missing))) as advance:
        for shard in job.executor.map(partial(_open_worker, job, prepare, known), missing):
            advance(len(shard))
    job.folder.fetch(directory)


def _open_worker(
    job: Job, prepare: Prepare, known: int | None
) -> Callable[[Iterable[Shard]], Iterator[Shard]]:
    """Return what measures and stores shards, yielding each when it is safe.

    `known`: the tokens per batch of the shards that are there already.
    """
    from gradsift.gradients.batch_size import find_batch_tokens, within_memory
    from gradsift.models.batches import ahead, lengths_of

    engine, pool = job.config.engine, job.pool
    job.folder.fetch_inputs()
    measure, device = prepare()
    if known and engine.batch_tokens == "auto":
        max_tokens = known
    else:
        lengths = pool.column("num_tokens").to_numpy()
        max_tokens = find_batch_tokens(measure, lengths, engine, device)

    def windows(shards: Iterable[Shard]) -> Iterator[tuple[Shard, bool, list[Encoded]]]:
        for shard in shards:
            if shard.path.exists() and find_damage(shard) is None:
                yield shard, True, []  # of a worker that died before it could say so
                continue
            for start in range(shard.start, shard.stop, engine.window):
                stop = min(start + engine.window, shard.stop)
                yield shard, stop == shard.stop, pool.examples(np.arange(start, stop))

    def work(shards: Iterable[Shard]) -> Iterator[Shard]:
        nonlocal max_tokens
        writing: tuple[Shard, Future[None]] | None = None
        parts: list[Mapping[str, Tensor]] = []
        with ThreadPoolExecutor(1) as writer:
            try:
                for shard, is_last, examples in ahead(windows(shards)):
                    if not examples:
                        yield shard
                        continue
                    doing = partial(measure, examples)
                    found, max_tokens = within_memory(doing, max_tokens, lengths_of(examples))
                    parts.append(found)
                    if is_last:
                        if writing:
                            writing[1].result()
                            yield writing[0]
                        writing = shard, writer.submit(_write, job, shard, parts, max_tokens)
                        parts = []
            finally:
                if writing:
                    writing[1].result()
            if writing:
                yield writing[0]

    return work


def _write(job: Job, shard: Shard, parts: Sequence[Mapping[str, Tensor]], max_tokens: int) -> None:
    import torch

    tensors = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    check_finite(tensors, "of the pool", job.pool, shard.start)
    save_shard(shard, tensors, {_BATCH_TOKENS: max_tokens})
    job.folder.publish(shard.path)

"""What one process does in a pass over the pool: it measures shards and stores them.

A shard is measured window by window: batches are formed among the examples of a window alone, so
that the number of workers changes no bit, nor, where windows do not grow with shards (on a CPU),
their size. While the device works on a window, one thread reads the next and another writes the
shard before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.models.batch_size import find_batch_tokens, within_memory
from gradsift.models.batches import lengths_of, prefetch
from gradsift.pool.examples import MeasureFactory, check_finite
from gradsift.pool.shards import (
    BATCH_TOKENS,
    WINDOW,
    Task,
    save_shard,
    shard_size,
    window_size,
)
from gradsift.progress import batches_counted
from gradsift.runs.folder import Run

if TYPE_CHECKING:
    from torch import Tensor


class Worker:
    """Measures shards and stores them; `worker(tasks)` yields each when it is safe."""

    def __init__(
        self,
        pool: EncodedSet,
        folder: Run,
        engine: EngineConfig,
        factory: MeasureFactory,
        known: Mapping[str, int] | None,
    ) -> None:
        """Load what the measure needs, and find tokens per batch and window.

        `known`: the facts of a shard that is there already; both are taken from it, the window as
        far as whole ones make a shard.
        """
        folder.fetch_inputs()
        self._pool, self._folder = pool, folder
        self._measure, device = factory()
        if known and engine.batch_tokens == "auto":
            self._max_tokens = known[BATCH_TOKENS]
        else:
            lengths = pool.column("num_tokens").to_numpy()
            self._max_tokens = find_batch_tokens(self._measure, lengths, engine, device)
        size = shard_size(engine, len(pool))
        if known and engine.window == "auto":
            self._window = gcd(known[WINDOW], size)
        else:
            self._window = window_size(engine, size, self._max_tokens, device)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Measure the shards of each task, and yield it when its files are whole."""
        writing: tuple[Task, Future[None]] | None = None
        parts: list[Mapping[str, Tensor]] = []
        with ThreadPoolExecutor(1) as writer:
            try:
                for task, left, is_last, examples in prefetch(self._windows(tasks)):
                    if not left:
                        yield task
                        continue
                    parts.append(self._measure_window(examples))
                    if is_last:
                        if writing:
                            writing[1].result()
                            yield writing[0]
                        writing = task, writer.submit(self._write, left, parts, self._max_tokens)
                        parts = []
            finally:
                if writing:
                    writing[1].result()
            if writing:
                yield writing[0]

    def _windows(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Task, bool, list[Encoded]]]:
        """Yield each window: its task, the shards of it to write, whether it is the last, examples.

        A task whose shards are there already has none to write: a worker stored them and died
        before it could say so.
        """
        for task in tasks:
            left = tuple(shard for shard in task if not shard.is_whole())
            if not left:
                yield task, left, True, []
                continue
            first, end = task[0].start, task[0].stop
            for start in range(first, end, self._window):
                stop = min(start + self._window, end)
                yield task, left, stop == end, self._pool.examples(np.arange(start, stop))

    def _measure_window(self, examples: Sequence[Encoded]) -> Mapping[str, Tensor]:
        def work(max_tokens: int) -> Mapping[str, Tensor]:
            with batches_counted():
                found = self._measure(examples, max_tokens)
            # on to the host here, where memory that runs out means smaller batches
            return {name: tensor.cpu() for name, tensor in found.items()}

        found, self._max_tokens = within_memory(work, self._max_tokens, lengths_of(examples))
        return found

    def _write(self, shards: Task, parts: Sequence[Mapping[str, Tensor]], max_tokens: int) -> None:
        tensors = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
        for shard in shards:
            own = shard.own(tensors)
            check_finite(own, "of the pool", self._pool, shard.start)
            save_shard(shard, own, {BATCH_TOKENS: max_tokens, WINDOW: self._window})
            self._folder.publish(shard.path)

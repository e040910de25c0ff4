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
    Shard,
    find_damage,
    save_shard,
    shard_size,
    window_size,
)
from gradsift.progress import batches_counted
from gradsift.runs.folder import Run

if TYPE_CHECKING:
    from torch import Tensor


class Worker:
    """Measures shards and stores them; `worker(shards)` yields each when it is safe."""

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

    def __call__(self, shards: Iterable[Shard]) -> Iterator[Shard]:
        """Measure the shards, and yield each when its file is whole."""
        writing: tuple[Shard, Future[None]] | None = None
        parts: list[Mapping[str, Tensor]] = []
        with ThreadPoolExecutor(1) as writer:
            try:
                for shard, is_last, examples in prefetch(self._windows(shards)):
                    if not examples:
                        yield shard
                        continue
                    parts.append(self._measure_window(examples))
                    if is_last:
                        if writing:
                            writing[1].result()
                            yield writing[0]
                        writing = shard, writer.submit(self._write, shard, parts, self._max_tokens)
                        parts = []
            finally:
                if writing:
                    writing[1].result()
            if writing:
                yield writing[0]

    def _windows(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, bool, list[Encoded]]]:
        """Yield the examples of each window, and whether it is the last of its shard.

        A shard that is there already has none: a worker stored it and died before it could say so.
        """
        for shard in shards:
            if shard.path.exists() and find_damage(shard) is None:
                yield shard, True, []
                continue
            for start in range(shard.start, shard.stop, self._window):
                stop = min(start + self._window, shard.stop)
                yield shard, stop == shard.stop, self._pool.examples(np.arange(start, stop))

    def _measure_window(self, examples: Sequence[Encoded]) -> Mapping[str, Tensor]:
        def work(max_tokens: int) -> Mapping[str, Tensor]:
            with batches_counted():
                found = self._measure(examples, max_tokens)
            # on to the host here, where memory that runs out means smaller batches
            return {name: tensor.cpu() for name, tensor in found.items()}

        found, self._max_tokens = within_memory(work, self._max_tokens, lengths_of(examples))
        return found

    def _write(self, shard: Shard, parts: Sequence[Mapping[str, Tensor]], max_tokens: int) -> None:
        names = parts[0]
        tensors = {name: torch.cat([part[name] for part in parts]).numpy() for name in names}
        check_finite(tensors, "of the pool", self._pool, shard.start)
        save_shard(shard, tensors, {BATCH_TOKENS: max_tokens, WINDOW: self._window})
        self._folder.publish(shard.path)

"""The pass over the pool: fixed ranges of it, each measured and stored by itself.

While the device works on a shard, one thread reads the next and another writes the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.numpy import save_file

from gradsift.config import EngineConfig
from gradsift.data import Encoded, EncodedSet
from gradsift.errors import NumericsError
from gradsift.progress import track
from gradsift.store import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

_BATCH_TOKENS = "batch_tokens"

Measure = Callable[[Sequence[Encoded], int], "Mapping[str, Tensor]"]
"""What to store of some examples, row by row and by name, given the most tokens per batch."""
Rows = slice | Int[np.ndarray, " row"]


@dataclass(frozen=True)
class Shard:
    """A fixed range of the pool and the file that holds its results."""

    start: int
    stop: int
    path: Path

    @property
    def rows(self) -> np.ndarray:
        """The rows of the pool that it covers."""
        return np.arange(self.start, self.stop)


def plan_shards(num_examples: int, size: int, directory: Path) -> list[Shard]:
    """Return the ranges that the pool is cut into, the same for every run and worker."""
    return [
        Shard(start, min(start + size, num_examples), directory / f"{start:010d}.safetensors")
        for start in range(0, num_examples, size)
    ]


def batch_tokens_of(shard: Shard) -> int:
    """Return the tokens per batch with which a stored shard was measured."""
    with safe_open(shard.path, "np") as file:
        return int(file.metadata()[_BATCH_TOKENS])


def measure_pool(
    pool: EncodedSet,
    directory: Path,
    engine: EngineConfig,
    prepare: Callable[[], tuple[Measure, torch.device]],
) -> None:
    """Measure the whole pool, shard by shard, into a folder; what is there is not done again.

    `prepare` is asked for the measure, and where it works, only if something is missing.

    Raises:
        NumericsError: Naming the first example of which something is not finite.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(len(pool), engine.shard_size, directory)
    stored = [shard for shard in shards if shard.path.exists()]
    missing = [shard for shard in shards if shard not in stored]
    if not missing:
        return
    from gradsift.memory import find_batch_tokens

    measure, device = prepare()
    if stored:
        logger.info("%d of %d shards are there already", len(stored), len(shards))
    if stored and engine.batch_tokens == "auto":
        max_tokens = batch_tokens_of(stored[-1])
    else:
        lengths = pool.table(["num_tokens"])["num_tokens"].to_numpy()
        max_tokens = find_batch_tokens(measure, lengths, engine, device)
    measure_shards(pool, missing, measure, max_tokens)


def measure_target(
    target: EncodedSet,
    path: Path,
    engine: EngineConfig,
    prepared: tuple[Measure, torch.device],
) -> None:
    """Store what the measure finds of a target's examples, row by row, in one file.

    Raises:
        NumericsError: Naming the first example of which something is not finite.
    """
    tensors = measure_examples(target.examples(range(len(target))), engine, prepared)
    check_finite(tensors, f"of the target {target.path.stem.removeprefix('target.')!r}", target)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def measure_examples(
    examples: Sequence[Encoded], engine: EngineConfig, prepared: tuple[Measure, torch.device]
) -> dict[str, np.ndarray]:
    """Return what the measure finds of some examples, row by row, in batches that fit."""
    from gradsift.batches import lengths_of
    from gradsift.memory import start_tokens, within_memory

    measure, device = prepared
    work = partial(measure, examples)
    found, _ = within_memory(work, start_tokens(engine, device), lengths_of(examples))
    return {name: np.ascontiguousarray(values.cpu()) for name, values in found.items()}


def measure_shards(
    pool: EncodedSet, shards: Sequence[Shard], measure: Measure, max_tokens: int
) -> None:
    """Store, for each shard, what `measure` finds of its examples, row by row.

    Raises:
        NumericsError: Naming the first example of which something is not finite.
    """
    from gradsift.batches import ahead, lengths_of
    from gradsift.memory import within_memory

    total = sum(shard.stop - shard.start for shard in shards)
    label = "/".join(shards[0].path.parent.parts[-2:])
    with track(label, total) as advance, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        try:
            for shard, examples in ahead((shard, pool.examples(shard.rows)) for shard in shards):
                work = partial(measure, examples)
                found, max_tokens = within_memory(work, max_tokens, lengths_of(examples))
                if writing:
                    writing.result()
                writing = writer.submit(_write, shard, found, pool, max_tokens)
                advance(len(examples))
        finally:
            if writing:
                writing.result()


def _write(shard: Shard, found: Mapping[str, Tensor], pool: EncodedSet, max_tokens: int) -> None:
    tensors = {name: values.cpu().numpy() for name, values in found.items()}
    check_finite(tensors, "of the pool", pool, shard.start)
    save_shard(shard, tensors, {_BATCH_TOKENS: str(max_tokens)})


def check_finite(
    tensors: Mapping[str, np.ndarray], whose: str, encoded: EncodedSet, start: int = 0
) -> None:
    """Make sure that all is finite that was found of some examples, the first being `start`.

    Raises:
        NumericsError: Naming the first example of which something is not.
    """
    for name, values in tensors.items():
        broken = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(broken):
            told = f"{name.partition('/')[0].replace('_', ' ')} {whose}"
            raise not_finite(told, encoded, start + broken)


def save_shard(
    shard: Shard, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write what was found of a shard's examples, a row for each, atomically."""
    whole = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    write_atomically(shard.path, lambda path: save_file(whole, path, dict(metadata or {})))


def not_finite(what: str, encoded: EncodedSet, rows: np.ndarray) -> NumericsError:
    """Return the error that names the first of the rows of which something is not finite."""
    where = encoded.take(rows[:1], ["id", "file", "line"]).to_pylist()[0]
    return NumericsError(
        f"the {what} is not finite for {len(rows)} examples, the first being {where['id']!r} "
        f"({where['file']}:{where['line']}); is the model or its adapter broken? Try "
        "model.dtype=float32"
    )


class Stored:
    """One tensor of the whole pool, read from its shards as rows are asked for."""

    def __init__(self, directory: Path, name: str, num_examples: int) -> None:
        """Find the shards.

        Raises:
            FileNotFoundError: With the folder, if they do not hold every example once.
        """
        self._name, self._num_examples = name, num_examples
        self._paths = sorted(directory.glob("*.safetensors"))
        starts = []
        end = 0
        for path in self._paths:
            starts.append(int(path.stem))
            if starts[-1] != end:
                break
            with safe_open(path, "np") as shard:
                end += shard.get_slice(name).get_shape()[0]
        if end != num_examples:
            raise FileNotFoundError(directory)
        self._starts = np.array(starts)

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, rows: Rows) -> Float[np.ndarray, "row ..."]:
        """Return some rows, in the order asked for, reading only their shards."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self._num_examples)
            assert step == 1, "ranges are read as they lie"
            return np.concatenate(list(self._range(start, stop)))
        unique, inverse = np.unique(rows, return_inverse=True)
        owners = np.searchsorted(self._starts, unique, side="right") - 1
        parts = list(self._range(0, 0))
        for owner in np.unique(owners):
            with safe_open(self._paths[owner], "np") as shard:
                local = unique[owners == owner] - self._starts[owner]
                parts.append(shard.get_tensor(self._name)[local])
        return np.concatenate(parts)[inverse]

    def _range(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the parts of a range that its shards hold; at least an empty one."""
        first, last = np.searchsorted(self._starts, [start, max(start, stop - 1)], side="right") - 1
        for owner in range(int(first), int(last) + 1):
            offset = int(self._starts[owner])
            with safe_open(self._paths[owner], "np") as shard:
                whole = shard.get_slice(self._name)
                end = min(stop - offset, whole.get_shape()[0])
                yield whole[max(start - offset, 0) : max(end, 0)]

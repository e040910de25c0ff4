"""Shards: fixed ranges of the pool, each with a file of its own that tells when it is damaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gradsift.config import LEAST_WINDOW, EngineConfig
from gradsift.runs.atomic import write_atomically
from gradsift.runs.hashing import HASH_THREADS, hash_tensors

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
BATCH_TOKENS, WINDOW = "batch_tokens", "window"
"""The facts that say with how many tokens per batch, and among how many examples at a time, a
shard was measured."""
_ENTRY, _HASH = "gradsift", "sha256"
# examples of a shard, where none are set, at most; and how many shards a pool leaves at least
_LARGEST, _SHARDS = 4096, 64
_TOKENS_OF_EXAMPLE = 8  # of a batch, at most: a window holds sixteen batches of 128 tokens each
Rows = slice | Int[np.ndarray, " row"]
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A fixed range of the pool and the file that holds its results.

    `key` tells its stage, with all that it was made from, from every other. `part`: where one
    measure serves several stages, which of its tensors are this one's.
    """

    start: int
    stop: int
    path: Path
    key: str
    part: str = ""

    def __len__(self) -> int:
        return self.stop - self.start

    def own(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Return those of `PART/NAME`, by NAME, and those that belong to no part."""
        found = {name: value for name, value in tensors.items() if "/" not in name}
        prefix = f"{self.part}/"
        return found | {
            n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)
        }

    def is_whole(self) -> bool:
        """Return whether its file is there and holds what was written."""
        return self.path.exists() and find_damage(self) is None


Task = tuple[Shard, ...]
"""Shards of one range, of several stages that are measured together."""


def shard_size(engine: EngineConfig, num_examples: int) -> int:
    """Return the examples of a shard: as set, or by the pool alone, as each machine plans them.

    The largest that leaves 64 shards, in whole windows.

    >>> [shard_size(EngineConfig(), count) for count in (40_000, 140_000, 270_000)]
    [1024, 2048, 4096]
    """
    if engine.shard_size != "auto":
        return engine.shard_size
    wanted = min(max(num_examples // _SHARDS, LEAST_WINDOW), _LARGEST)
    size = 1 << wanted.bit_length() - 1
    return max(engine.least_window, size // engine.least_window * engine.least_window)


def window_size(engine: EngineConfig, size: int, batch_tokens: int, device: torch.device) -> int:
    """Return the examples of a window, where a shard has `size`.

    As set. Else the fewest on a CPU, where no size of shards is to change a bit; on a GPU by tokens
    per batch: a window that makes but a few batches is hardly sorted by length.

    >>> from torch import device
    >>> cuda = device("cuda")
    >>> [window_size(EngineConfig(), 4096, tokens, cuda) for tokens in (2048, 14_336, 32_768)]
    [1024, 2048, 4096]
    """
    if engine.window != "auto" or device.type == "cpu":
        return engine.least_window
    wanted = 1 << (batch_tokens // _TOKENS_OF_EXAMPLE - 1).bit_length()
    return gcd(max(engine.least_window, wanted), size)


def plan_shards(
    num_examples: int, size: int, directory: Path, key: str, part: str = ""
) -> list[Shard]:
    """Return the ranges that the pool is cut into, the same for every run and worker."""
    stops = [min(start + size, num_examples) for start in range(0, num_examples, size)]
    return [
        Shard(start, stop, directory / f"{start:010d}{SUFFIX}", key, part)
        for start, stop in zip(range(0, num_examples, size), stops, strict=True)
    ]


def save_shard(
    shard: Shard, tensors: Mapping[str, np.ndarray], facts: Mapping[str, int] | None = None
) -> None:
    """Write what was found of a shard's examples, a row for each, atomically and with its hash."""
    whole = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    beside = dict(facts or {})
    # in one entry: safetensors writes several in no fixed order
    metadata = {_ENTRY: json.dumps(beside | {_HASH: _hash(shard, whole, beside)})}
    write_atomically(shard.path, lambda path: save_file(whole, path, metadata))


def read_facts(shard: Shard) -> dict[str, int]:
    """Return what was written beside the tensors of a shard."""
    with safe_open(shard.path, "np") as file:
        return json.loads(file.metadata()[_ENTRY])


def find_damage(shard: Shard) -> str | None:
    """Return what is wrong with a shard's file: nothing if it holds what was written."""
    try:
        with safe_open(shard.path, "np") as file:
            facts = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = facts.pop(_HASH, None)
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        return f"it cannot be read ({error})"
    if written != _hash(shard, tensors, facts):
        return "it is not what was written for these rows of this run"
    return None


def damaged_shards(shards: Sequence[Shard], intact: set[Path]) -> dict[Shard, str]:
    """Return what is wrong with the shards that are there, but are not what was written.

    `intact` has the paths of those that need not be looked at again, and is added to.
    """
    looked_at = [shard for shard in shards if shard.path not in intact and shard.path.exists()]
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        found = [*zip(looked_at, threads.map(find_damage, looked_at), strict=True)]
    intact.update(shard.path for shard, damage in found if damage is None)
    return {shard: damage for shard, damage in found if damage is not None}


def missing_shards(
    shards: Sequence[Shard], intact: set[Path], remove: Callable[[Path], object]
) -> list[Shard]:
    """Return the shards that are still to do; for damaged ones, `remove` is called."""
    for shard, damage in damaged_shards(shards, intact).items():
        logger.warning("%s is damaged and is measured again: %s", shard.path, damage)
        remove(shard.path)
    return [shard for shard in shards if not shard.path.exists()]


def _hash(shard: Shard, tensors: Mapping[str, np.ndarray], facts: Mapping[str, int]) -> str:
    """Return a hash of a shard's content, the rows that it is about, and what it was made from."""
    return hash_tensors(tensors, [shard.start, shard.stop, shard.key, facts])


class StoredTensor:
    """One tensor of the whole pool, read from its shards as rows are asked for."""

    def __init__(self, shards: Sequence[Shard], name: str, intact: set[Path]) -> None:
        """Check the shards that were not looked at before; see `damaged_shards`.

        Raises:
            FileNotFoundError: Naming the first that is missing or damaged, and why.
        """
        for shard, damage in damaged_shards(shards, intact).items():
            raise FileNotFoundError(f"{shard.path} is damaged: {damage}")
        for shard in shards:
            if not shard.path.exists():
                raise FileNotFoundError(f"{shard.path} is gone")
        self._name, self._num_examples = name, shards[-1].stop
        self._paths = [shard.path for shard in shards]
        self._starts = np.array([shard.start for shard in shards])

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, rows: Rows) -> Shaped[np.ndarray, "row ..."]:
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

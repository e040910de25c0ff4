"""The pass over the pool: fixed ranges of it, each measured and stored by itself.

While the device works on a shard, one thread reads the next and another writes the one before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file

from gradsift.data import EncodedSet
from gradsift.errors import NumericsError, RunError
from gradsift.progress import track
from gradsift.store import write_atomically
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from torch import nn

    from gradsift.basis import Basis
    from gradsift.passes import Projections

logger = logging.getLogger(__name__)

_BATCH_TOKENS = "batch_tokens"


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


def directory_of(run: Path, checkpoint: Checkpoint) -> Path:
    """Return the folder of a checkpoint's shards."""
    return run / "coordinates" / checkpoint.label


def batch_tokens_of(shard: Shard) -> int:
    """Return the tokens per batch with which a stored shard was measured."""
    with safe_open(shard.path, "np") as file:
        return int(file.metadata()[_BATCH_TOKENS])


def measure_shards(
    model: nn.Module,
    pool: EncodedSet,
    shards: Sequence[Shard],
    basis: Basis,
    ranks: Mapping[str, int],
    max_tokens: int,
) -> None:
    """Measure the shards and store, for each, coordinates, losses and gradient norms.

    `ranks` says how many of the basis' directions each target has, in their order.

    Raises:
        NumericsError: Naming the first example whose loss or gradient is not finite.
    """
    from gradsift.batches import ahead, lengths_of
    from gradsift.memory import within_memory
    from gradsift.passes import project

    total = sum(shard.stop - shard.start for shard in shards)
    label = f"pool at {shards[0].path.parent.name}"
    with track(label, total) as advance, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        try:
            for shard, examples in ahead((shard, pool.examples(shard.rows)) for shard in shards):
                work = partial(project, model, examples, basis)
                found, max_tokens = within_memory(work, max_tokens, lengths_of(examples))
                if writing:
                    writing.result()
                writing = writer.submit(_write, shard, found, ranks, pool, max_tokens)
                advance(len(examples))
        finally:
            if writing:
                writing.result()


def _write(
    shard: Shard, found: Projections, ranks: Mapping[str, int], pool: EncodedSet, max_tokens: int
) -> None:
    coordinates = found.coordinates.cpu().numpy()
    tensors = {
        "loss": found.losses.cpu().numpy(),
        "gradient_norm": found.gradient_norms.cpu().numpy(),
    }
    for what, values in [("coordinates", coordinates), *tensors.items()]:
        finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if not finite.all():
            told = f"{what.replace('_', ' ')} of the pool"
            raise not_finite(told, pool, shard.rows[~finite])
    parts = np.split(coordinates, np.cumsum([*ranks.values()])[:-1], axis=1)
    for name, part in zip(ranks, parts, strict=True):
        tensors[f"coordinates/{name}"] = np.ascontiguousarray(part)
    metadata = {_BATCH_TOKENS: str(max_tokens)}
    write_atomically(shard.path, lambda path: save_file(tensors, path, metadata))


def not_finite(what: str, encoded: EncodedSet, rows: np.ndarray) -> NumericsError:
    """Return the error that names the first of the rows of which something is not finite."""
    where = encoded.take(rows[:1], ["id", "file", "line"]).to_pylist()[0]
    return NumericsError(
        f"the {what} is not finite for {len(rows)} examples, the first being {where['id']!r} "
        f"({where['file']}:{where['line']}); is the adapter broken? Try model.dtype=float32"
    )


def load_pool(
    run: Path, checkpoint: Checkpoint, names: Sequence[str]
) -> dict[str, Float[np.ndarray, "..."]]:
    """Return what the pool pass stored under these names, for the whole pool."""
    paths = sorted(directory_of(run, checkpoint).glob("*.safetensors"))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in paths:
        with safe_open(path, "np") as shard:
            for name, part in parts.items():
                part.append(shard.get_tensor(name))
    stored = {name: np.concatenate(part) for name, part in parts.items()}
    num_pool = len(EncodedSet(run / "data" / "pool.parquet"))
    if any(len(values) != num_pool for values in stored.values()):
        raise RunError(
            f"shards are missing in {paths[0].parent}; remove manifests/coordinates.json in {run} "
            "and run the same command: what is there is kept"
        )
    return stored

"""The index of a pool: a sketch of every example's gradient, and products read out of it.

The pass that makes it needs no target. Later the gradients of a target are sketched the same way,
and their products with the pool's are those of the sketches: approximate, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from gradsift.config import EngineConfig
from gradsift.data.encoding import Encoded
from gradsift.pool.coordinates import Part
from gradsift.pool.examples import Measure
from gradsift.pool.pool_pass import PoolPass
from gradsift.pool.shards import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gradsift.models.cache import ModelCache

_BYTES_AT_ONCE = 1 << 27  # of sketches in float32


def make_sketch_measure(
    models: ModelCache, adapter: Path, path: Path
) -> tuple[Measure, torch.device]:
    """Return what sketches gradients at an adapter, and its device; `path`: the stored sketch."""
    from gradsift.gradients.sketch import load_sketch, quantize

    model = models.with_adapter(adapter)
    sketch = load_sketch(model, path)

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        found = sketch.project(model, examples, max_tokens)
        numbers, steps = quantize(found.coordinates)
        norms = {"loss": found.losses, "gradient_norm": found.gradient_norms}
        return {"sketch": numbers, "step": steps, **norms}

    return measure, model.device


def sketch_combinations(
    models: ModelCache, adapter: Path, path: Path, parts: Sequence[Part], engine: EngineConfig
) -> Float[np.ndarray, "direction number"]:
    """Return the sketches of combinations of a few examples' gradients, before any rounding."""
    from gradsift.gradients.memory import small_batch
    from gradsift.gradients.sketch import load_sketch
    from gradsift.models.batch_size import within_memory
    from gradsift.models.batches import lengths_of

    model = models.with_adapter(adapter)
    sketch, found = load_sketch(model, path), []
    for examples, combination in parts:
        work = partial(sketch.project, model, examples)
        projections, _ = within_memory(work, small_batch(engine), lengths_of(examples))
        found.append(combination.T @ projections.coordinates.cpu().numpy())
    return np.concatenate(found)


class StoredSketches:
    """The stored sketches of a pool at a checkpoint, read range by range."""

    def __init__(self, pool_pass: PoolPass, checkpoint: str) -> None:
        """Check the shards that were not looked at before.

        Raises:
            RunError: If shards are missing or damaged.
        """
        names = ("sketch", "step", "loss", "gradient_norm")
        found: list[StoredTensor] = [pool_pass.read(name, checkpoint) for name in names]
        self._sketches, self._steps, self._losses, self._norms = found

    def products(
        self, directions: Float[np.ndarray, "direction number"], start: int, stop: int
    ) -> dict[str, Tensor]:
        """Return the products of a range of the pool with some directions, losses and norms."""
        import torch

        right = torch.from_numpy(np.ascontiguousarray(directions.T, np.float32))
        at_once = max(1, _BYTES_AT_ONCE // (4 * len(right)))
        parts = []
        for first in range(start, stop, at_once):
            rows = slice(first, min(first + at_once, stop))
            numbers = torch.from_numpy(self._sketches[rows]).float()
            parts.append((numbers @ right) * torch.from_numpy(self._steps[rows])[:, None])
        rows = slice(start, stop)
        return {
            "products": torch.cat(parts),
            "loss": torch.from_numpy(self._losses[rows]),
            "gradient_norm": torch.from_numpy(self._norms[rows]),
        }

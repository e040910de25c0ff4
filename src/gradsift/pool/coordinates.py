"""What is measured for methods that compare gradients: one backward pass serves all targets.

What is stored of an example are its gradient's inner products with combinations of other gradients:
an orthonormal basis of each target's subspace, or one direction per target example. They are kept
at length 1 in float16, with their length beside them: half the disk, and cosines to 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from gradsift.config import Config
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.pool.examples import Measure
from gradsift.pool.pool_pass import PoolPass
from gradsift.pool.shards import Rows, StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gradsift.models.cache import ModelCache


Part = tuple[Sequence[Encoded], Float[np.ndarray, "_ _"]]
"""Examples, and a combination (example × direction) of their gradients."""
Directions = tuple[Sequence[Part], Mapping[str, int]]
"""Parts, whose directions stand one below the other, and how many of them each target has."""


def make_projection_measure(
    models: ModelCache,
    adapter: Path,
    parts: Sequence[Part],
    widths: Mapping[str, int],
    config: Config,
) -> tuple[Measure, torch.device]:
    """Return what measures coordinates, losses and gradient norms at an adapter, and its device.

    `parts` make the directions, one below the other; `widths` says how many of them, in that order,
    belong to each target, whose tensors are `TARGET/NAME`.
    """
    from gradsift.gradients.basis import fitting_basis
    from gradsift.gradients.projection import project

    model = models.with_adapter(adapter)
    basis = fitting_basis(model, parts, config)

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        found = project(model, examples, max_tokens, basis)
        tensors = {"loss": found.losses, "gradient_norm": found.gradient_norms}
        return tensors | to_store(found.coordinates, widths)

    return measure, model.device


def to_store(
    coordinates: Float[Tensor, "example direction"], widths: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return coordinates as they are kept: for each target what `read_coordinates` reads."""
    found = {}
    for name, own in zip(widths, coordinates.split([*widths.values()], dim=1), strict=True):
        lengths = own.norm(dim=1)
        units = own / lengths.masked_fill(lengths == 0, 1)[:, None]
        found |= {f"{name}/coordinates": units.half(), f"{name}/length": lengths}
    return found


@dataclass(frozen=True)
class StoredCoordinates:
    """Coordinates as they were before they were stored, in float32, read row by row."""

    units: StoredTensor | np.ndarray
    lengths: StoredTensor | np.ndarray

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, rows: Rows) -> Float[np.ndarray, "row direction"]:
        return self.units[rows].astype(np.float32) * self.lengths[rows][:, None]


def read_coordinates(pool_pass: PoolPass, checkpoint: str) -> StoredCoordinates:
    """Return what a pass stored of the pool at a checkpoint.

    Raises:
        RunError: If shards are missing or damaged.
    """
    read = pool_pass.read
    return StoredCoordinates(read("coordinates", checkpoint), read("length", checkpoint))


def by_target(
    targets: Mapping[str, EncodedSet], combinations: Mapping[str, Float[np.ndarray, "_ _"]]
) -> Directions:
    """Return parts and widths where each target's directions are made of its own gradients.

    `combinations`: (query × direction) by target.
    """
    from gradsift.gradients.distinct import distinct_examples, merge_rows

    parts: list[Part] = []
    for name, combination in combinations.items():
        examples, inverse = distinct_examples(targets[name])
        parts.append((examples, merge_rows(combination, inverse, len(examples))))
    return parts, {name: combination.shape[1] for name, combination in combinations.items()}


def losses_and_norms(pool_pass: PoolPass, checkpoint: str) -> dict[str, np.ndarray]:
    """Return loss and gradient norm of every pool example at a checkpoint."""
    return {name: pool_pass.read(name, checkpoint)[:] for name in ("loss", "gradient_norm")}

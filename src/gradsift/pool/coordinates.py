"""What is measured for methods that compare gradients: one backward pass serves all targets.

What is stored of an example are its gradient's inner products with combinations of other gradients:
an orthonormal basis of each target's subspace, or one direction per target example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from gradsift.config import Config
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.pool.examples import Measure
from gradsift.pool.pool_pass import PoolPass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gradsift.models.cache import ModelCache


Part = tuple[Sequence[Encoded], Float[np.ndarray, "_ _"]]
"""Examples, and a combination (example × direction) of their gradients."""


def make_projection_measure(
    models: ModelCache,
    adapter: Path,
    parts: Sequence[Part],
    widths: Mapping[str, int],
    config: Config,
) -> tuple[Measure, torch.device]:
    """Return what measures coordinates, losses and gradient norms at an adapter, and its device.

    `parts` make the directions, one below the other; `widths` says how many of them, in that order,
    belong to each target.
    """
    from gradsift.gradients.basis import fitting_basis
    from gradsift.gradients.projection import project

    model = models.with_adapter(adapter)
    basis = fitting_basis(model, parts, config)

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        found = project(model, examples, max_tokens, basis)
        pieces = zip(widths, found.coordinates.split([*widths.values()], dim=1), strict=True)
        coordinates = {coordinates_key(name): piece for name, piece in pieces}
        return coordinates | {"loss": found.losses, "gradient_norm": found.gradient_norms}

    return measure, model.device


def by_target(
    targets: Mapping[str, EncodedSet], combinations: Mapping[str, Float[np.ndarray, "_ _"]]
) -> tuple[list[Part], dict[str, int]]:
    """Return parts and widths where each target's directions are made of its own gradients.

    `combinations`: (query × direction) by target.
    """
    from gradsift.gradients.distinct import distinct_examples, merge_rows

    parts: list[Part] = []
    for name, combination in combinations.items():
        examples, inverse = distinct_examples(targets[name])
        parts.append((examples, merge_rows(combination, inverse, len(examples))))
    return parts, {name: combination.shape[1] for name, combination in combinations.items()}


def coordinates_key(target: str) -> str:
    """Return the name under which an example's coordinates for a target are stored."""
    return f"coordinates/{target}"


def losses_and_norms(pool_pass: PoolPass, checkpoint: str) -> dict[str, np.ndarray]:
    """Return loss and gradient norm of every pool example at a checkpoint."""
    return {name: pool_pass.read(name, checkpoint)[:] for name in ("loss", "gradient_norm")}

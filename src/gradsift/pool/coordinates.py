"""What is measured for methods that compare gradients: one backward pass serves all targets.

What is stored of an example are its gradient's inner products with combinations of the targets'
gradients: an orthonormal basis of each target's subspace, or the target gradients themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.pool.examples import Measure
from gradsift.pool.pool_pass import PoolPass

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gradsift.models.cache import ModelCache


def make_projection_measure(
    models: ModelCache,
    adapter: Path,
    targets: Mapping[str, EncodedSet],
    combinations: Mapping[str, Float[np.ndarray, "_ _"]],
    engine: EngineConfig,
) -> tuple[Measure, torch.device]:
    """Return what measures coordinates, losses and gradient norms at an adapter, and its device.

    `combinations` (query × direction, by target) make each target's directions of its gradients.
    """
    from gradsift.gradients.basis import fitting_basis
    from gradsift.gradients.distinct import distinct_examples, merge_rows
    from gradsift.gradients.projection import project

    ranks = [combination.shape[1] for combination in combinations.values()]
    model = models.with_adapter(adapter)
    parts = []
    for name, combination in combinations.items():
        examples, inverse = distinct_examples(targets[name])
        parts.append((examples, merge_rows(combination, inverse, len(examples))))
    basis = fitting_basis(model, parts, engine)

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        found = project(model, examples, max_tokens, basis)
        pieces = zip(combinations, found.coordinates.split(ranks, dim=1), strict=True)
        coordinates = {coordinates_key(name): piece for name, piece in pieces}
        return coordinates | {"loss": found.losses, "gradient_norm": found.gradient_norms}

    return measure, model.device


def coordinates_key(target: str) -> str:
    """Return the name under which an example's coordinates for a target are stored."""
    return f"coordinates/{target}"


def losses_and_norms(pool_pass: PoolPass, checkpoint: str) -> dict[str, np.ndarray]:
    """Return loss and gradient norm of every pool example at a checkpoint."""
    return {name: pool_pass.read(name, checkpoint)[:] for name in ("loss", "gradient_norm")}

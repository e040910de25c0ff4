"""The pool pass of methods that compare gradients: one backward pass serves all targets.

What is stored of an example are its gradient's inner products with combinations of the targets'
gradients: an orthonormal basis of each target's subspace, or the target gradients themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from gradsift.data.encoding import Encoded
from gradsift.gradients.distinct import distinct_examples, merge_rows
from gradsift.methods.job import Job
from gradsift.pool.examples import Measure, measure_examples
from gradsift.pool.pool_pass import measure_pool
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def project_pool(
    job: Job,
    checkpoint: Checkpoint,
    stage: str,
    combinations: Mapping[str, Float[np.ndarray, "_ _"]],
) -> None:
    """Leave coordinates, losses and gradient norms of the whole pool, shard by shard, for a stage.

    `combinations` (query × direction, by target) make each target's directions of its gradients.

    Raises:
        NumericsError: Naming the first example whose loss or gradient is not finite.
    """
    prepare = partial(_prepare, job, checkpoint, combinations)
    measure_pool(job, stage, prepare, checkpoint.label)


def project_rows(
    job: Job,
    checkpoint: Checkpoint,
    rows: Int[np.ndarray, " row"],
    combinations: Mapping[str, Float[np.ndarray, "_ _"]],
) -> dict[str, np.ndarray]:
    """Return what `project_pool` would leave of some rows of the pool, by name."""
    return measure_examples(job, job.pool, rows, partial(_prepare, job, checkpoint, combinations))


def _prepare(
    job: Job, checkpoint: Checkpoint, combinations: Mapping[str, Float[np.ndarray, "_ _"]]
) -> tuple[Measure, torch.device]:
    """Return what measures some examples at a checkpoint, and where it works."""
    from gradsift.gradients.basis import fitting_basis
    from gradsift.gradients.projection import project

    ranks = [combination.shape[1] for combination in combinations.values()]
    model = job.models.at(checkpoint.path)
    basis = fitting_basis(model, _parts(job, combinations), job.config.engine)

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        found = project(model, examples, max_tokens, basis)
        parts = zip(combinations, found.coordinates.split(ranks, dim=1), strict=True)
        coordinates = {f"coordinates/{name}": part for name, part in parts}
        return coordinates | {"loss": found.losses, "gradient_norm": found.gradient_norms}

    return measure, model.device


def _parts(
    job: Job, combinations: Mapping[str, Float[np.ndarray, "_ _"]]
) -> list[tuple[list[Encoded], np.ndarray]]:
    """Return each target's different examples, and the combinations of their gradients."""
    parts = []
    for name, combination in combinations.items():
        examples, inverse = distinct_examples(job.targets[name])
        parts.append((examples, merge_rows(combination, inverse, len(examples))))
    return parts

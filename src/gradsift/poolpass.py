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

from gradsift.data import Encoded, EncodedSet
from gradsift.job import Job, distinct
from gradsift.measuring import Measure, measure_examples, measure_pool
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
    from gradsift.memory import fitting_basis
    from gradsift.passes import project

    ranks = [combination.shape[1] for combination in combinations.values()]
    model = job.models.at(checkpoint.path)
    basis = fitting_basis(model, _parts(job, combinations), job.config.engine)

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        found = project(model, examples, max_tokens, basis)
        parts = zip(combinations, found.coordinates.split(ranks, dim=1), strict=True)
        coordinates = {f"coordinates/{name}": part for name, part in parts}
        return coordinates | {"loss": found.losses, "gradient_norm": found.gradient_norms}

    return measure, model.device


def distinct_examples(
    target: EncodedSet, rows: Sequence[int] | np.ndarray | None = None
) -> tuple[list[Encoded], np.ndarray]:
    """Return the different examples (of all, or of some rows), and for each which of them it is.

    Equal examples have equal gradients: they are computed once, so that no rounding tells them
    apart and blows up the difference into a direction.
    """
    examples = target.examples(range(len(target)) if rows is None else rows)
    first, inverse = distinct([(e.input_ids.tobytes(), e.supervised.tobytes()) for e in examples])
    return [examples[i] for i in first], inverse


def _parts(
    job: Job, combinations: Mapping[str, Float[np.ndarray, "_ _"]]
) -> list[tuple[list[Encoded], np.ndarray]]:
    """Return each target's different examples, and the combinations of their gradients."""
    parts = []
    for name, combination in combinations.items():
        examples, inverse = distinct_examples(job.targets[name])
        parts.append((examples, merge_rows(combination, inverse, len(examples))))
    return parts


def merge_rows(
    combination: Float[np.ndarray, "query direction"],
    inverse: Int[np.ndarray, " query"],
    num_distinct: int,
) -> Float[np.ndarray, "distinct direction"]:
    """Return a combination of examples as one of the different ones among them."""
    merged = np.zeros((num_distinct, combination.shape[1]))
    np.add.at(merged, inverse, combination)
    return merged

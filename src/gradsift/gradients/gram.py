"""The Gram matrix of target gradients, added up block by block.

A target is small: where its gradients do not fit into memory, they are computed more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.config import EngineConfig
from gradsift.data.encoding import Encoded
from gradsift.errors import ModelError
from gradsift.gradients.memory import memory_budget, small_batch
from gradsift.gradients.per_example import blocks, each_batch, gradient_scale
from gradsift.models.batch_size import within_memory
from gradsift.models.batches import device_of, group_examples, lengths_of

FLOAT_BYTES = 4  # bytes of a float32
_COLUMNS_AT_ONCE = 1 << 14  # of gradients that are float64 for a moment


def row_bytes(model: nn.Module) -> int:
    """Return the size of one example's whole gradient in float32."""
    return FLOAT_BYTES * sum(map(prod, blocks(model).values()))


def gram_matrix(
    model: nn.Module, examples: Sequence[Encoded], max_tokens: int, memory: int
) -> Float[np.ndarray, "query query"]:
    """Return G Gᵀ in float64, G holding one row of gradients per example.

    Rows are held in float32, as many at once as `memory` bytes hold. Where that is not all of
    them, the gradients that come after a block of rows are computed again for each such block.

    Raises:
        ModelError: If not a single row fits.
    """
    size = row_bytes(model)
    if size > memory:
        raise ModelError(
            f"one example's gradient takes {size / 2**30:.3g} GiB, more than the "
            f"{memory / 2**30:.3g} GiB of engine.memory (--memory); raise it, or lower lora.rank"
        )
    groups = group_examples(model, examples, max_tokens, max_examples=memory // size)
    ends = np.cumsum([len(group) for group in groups])
    upper = torch.zeros(len(examples), len(examples), dtype=torch.float64, device=device_of(model))
    first = 0
    while first < len(groups):
        start = int(ends[first]) - len(groups[first])
        last = int(np.searchsorted(ends, start + memory // size, side="right"))
        _gram_rows(model, examples, groups[first:], upper[start : ends[last - 1], start:])
        first = last
    upper = upper.triu().cpu().numpy() / gradient_scale(model) ** 2
    gram, order = np.empty_like(upper), np.concatenate(groups)
    gram[np.ix_(order, order)] = upper + np.triu(upper, 1).T
    return gram


def _gram_rows(
    model: nn.Module,
    examples: Sequence[Encoded],
    groups: Sequence[np.ndarray],
    products: Float[Tensor, "row query"],
) -> None:
    """Add to `products` those of the first rows, which are held, with all rows of the groups."""
    num_rows, device = len(products), products.device
    held = {n: torch.zeros(num_rows, *shape, device=device) for n, shape in blocks(model).items()}
    stop = 0
    for group, backpropagate in each_batch(model, examples, groups):
        start, stop = stop, stop + len(group)

        def take(name: str, gradient: Tensor, start: int = start, stop: int = stop) -> None:
            if stop <= num_rows:
                held[name][start:stop] = gradient
            else:
                _add_products(products[:, start:stop], held[name], gradient)

        backpropagate(take)
    for rows in held.values():
        _add_products(products[:, :num_rows], rows, rows)


def _add_products(into: Tensor, rows: Tensor, others: Tensor) -> None:
    """Add rows · othersᵀ in float64, a few columns at a time."""
    pieces = (tensor.flatten(1).split(_COLUMNS_AT_ONCE, dim=1) for tensor in (rows, others))
    for piece, other in zip(*pieces, strict=True):
        into.addmm_(piece.double(), other.double().T)


def fitting_gram(
    model: nn.Module, examples: Sequence[Encoded], engine: EngineConfig
) -> Float[np.ndarray, "query query"]:
    """Return `gram_matrix` of the examples, in rows and batches that fit.

    Raises:
        ModelError: If nothing does.
    """
    memory = memory_budget(engine, device_of(model))
    work = partial(gram_matrix, model, examples, memory=memory)
    return within_memory(work, small_batch(engine), lengths_of(examples))[0]

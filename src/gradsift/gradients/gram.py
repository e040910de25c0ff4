"""The Gram matrix of target gradients, added up block by block.

A target is small: where its gradients do not fit into memory, they are computed more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
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
    model: nn.Module,
    examples: Sequence[Encoded],
    max_tokens: int,
    memory: int,
    parts: Sequence[int] = (),
) -> Float[np.ndarray, "query query"]:
    """Return G Gᵀ in float64, G holding one row of gradients per example.

    Rows are held in float32, as many at once as `memory` bytes hold. Where that is not all of
    them, the gradients that come after a block of rows are computed again for each such block.
    `parts`: how many examples, one after the other, belong together; all, if it is empty. The
    products of two parts are the same bytes whatever other parts there are.

    Raises:
        ModelError: If not a single row fits.
    """
    size = row_bytes(model)
    if size > memory:
        raise ModelError(
            f"one example's gradient takes {size / 2**30:.3g} GiB, more than the "
            f"{memory / 2**30:.3g} GiB of engine.memory (--memory); raise it, or lower lora.rank"
        )
    groups, owners = _groups(model, examples, max_tokens, memory // size, parts or [len(examples)])
    ends = np.cumsum([len(group) for group in groups])
    upper = torch.zeros(len(examples), len(examples), dtype=torch.float64, device=device_of(model))
    first = 0
    while first < len(groups):
        start = int(ends[first]) - len(groups[first])
        last = int(np.searchsorted(ends, start + memory // size, side="right"))
        if last < len(groups) and owners[first] != owners[last] == owners[last - 1]:
            last = owners.index(owners[last])  # a part that is not held whole begins a block
        rows = upper[start : ends[last - 1], start:]
        _gram_rows(model, examples, groups[first:], owners[first:], rows)
        first = last
    upper = upper.triu().cpu().numpy() / gradient_scale(model) ** 2
    gram, order = np.empty_like(upper), np.concatenate(groups)
    gram[np.ix_(order, order)] = upper + np.triu(upper, 1).T
    return gram


def _groups(
    model: nn.Module,
    examples: Sequence[Encoded],
    max_tokens: int,
    max_examples: int,
    parts: Sequence[int],
) -> tuple[list[np.ndarray], list[int]]:
    """Return the groups that share a batch, formed within each part, and the part of each."""
    groups: list[np.ndarray] = []
    owners: list[int] = []
    for part, (start, stop) in enumerate(pairwise([0, *np.cumsum(parts).tolist()])):
        own = group_examples(model, examples[start:stop], max_tokens, max_examples)
        groups += [start + group for group in own]
        owners += [part] * len(own)
    return groups, owners


def _gram_rows(
    model: nn.Module,
    examples: Sequence[Encoded],
    groups: Sequence[np.ndarray],
    owners: Sequence[int],
    products: Float[Tensor, "row query"],
) -> None:
    """Add to `products` those of the first rows, which are held, with all rows of the groups.

    Of two parts by the groups of the second, whether it is held or not: with the same rounding.
    """
    num_rows, device = len(products), products.device
    shapes, held = blocks(model), dict[str, Tensor]()
    pieces, columns = _pieces(groups, owners, num_rows)
    stop = 0
    for group, backpropagate in each_batch(model, examples, groups):
        start, stop = stop, stop + len(group)

        def take(name: str, gradient: Tensor, start: int = start, stop: int = stop) -> None:
            if stop <= num_rows:
                if name not in held:
                    held[name] = torch.zeros(num_rows, *shapes[name], device=device)
                held[name][start:stop] = gradient
                return
            for piece in pieces:
                _add_products(products[piece, start:stop], held[name][piece], gradient)

        backpropagate(take)
    for rows in held.values():  # in the order in which they came
        for piece in pieces:
            _add_products(products[piece, piece], rows[piece], rows[piece])
            for other in columns[piece.stop]:
                _add_products(products[piece, other], rows[piece], rows[other])


def _pieces(
    groups: Sequence[np.ndarray], owners: Sequence[int], num_rows: int
) -> tuple[list[slice], dict[int, list[slice]]]:
    """Return the rows of each part among those held, and by their end the groups held after it.

    >>> groups, owners = [np.arange(2), np.arange(3), np.arange(1)], [0, 1, 1]
    >>> _pieces(groups, owners, 6)
    ([slice(0, 2, None), slice(2, 6, None)], {2: [slice(2, 5, None), slice(5, 6, None)], 6: []})
    """
    ends = np.cumsum([len(group) for group in groups]).tolist()
    slices = [slice(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    held = [own for own in slices if own.stop <= num_rows]
    last = [n for n, own in enumerate(held) if n + 1 == len(held) or owners[n] != owners[n + 1]]
    stops = [held[n].stop for n in last]
    pieces = [slice(*bounds) for bounds in pairwise([0, *stops])]
    return pieces, {stop: [own for own in held if own.start >= stop] for stop in stops}


def _add_products(into: Tensor, rows: Tensor, others: Tensor) -> None:
    """Add rows · othersᵀ in float64, a few columns at a time."""
    pieces = (tensor.flatten(1).split(_COLUMNS_AT_ONCE, dim=1) for tensor in (rows, others))
    for piece, other in zip(*pieces, strict=True):
        into.addmm_(piece.double(), other.double().T)


def fitting_gram(
    model: nn.Module, examples: Sequence[Encoded], engine: EngineConfig, parts: Sequence[int] = ()
) -> Float[np.ndarray, "query query"]:
    """Return `gram_matrix` of the examples, in rows and batches that fit.

    Raises:
        ModelError: If nothing does.
    """
    memory = memory_budget(engine, device_of(model))
    work = partial(gram_matrix, model, examples, memory=memory, parts=parts)
    return within_memory(work, small_batch(engine), lengths_of(examples))[0]

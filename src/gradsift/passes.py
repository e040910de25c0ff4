"""The uses of per-example gradients: Gram matrix, basis, coordinates, and whole rows.

The first three are sums over blocks, added up while the backward pass is at that block. The first
two go over a target, which is small, more than once where its gradients would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd, prod

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.basis import Basis, Shapes, choose_waiting
from gradsift.batches import lay_out, lengths_of, plan_batches, to_device
from gradsift.data import Encoded
from gradsift.errors import ModelError
from gradsift.gradients import Consume, PerExampleGradients, blocks, gradient_scale

MOST_EXAMPLES = 512
"""In one batch of a pool pass: very short ones would be too many gradients at a time."""
_FLOAT = 4  # bytes of a float32
_COLUMNS_AT_ONCE = 1 << 14  # of gradients that are float64 for a moment


def row_bytes(model: nn.Module) -> int:
    """Return the size of one example's whole gradient in float32."""
    return _FLOAT * sum(map(prod, blocks(model).values()))


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
    groups = plan_batches(lengths_of(examples), max_tokens, max_examples=memory // size)
    ends = np.cumsum([len(group) for group in groups])
    upper = torch.zeros(len(examples), len(examples), dtype=torch.float64, device=_device(model))
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
    for group, backpropagate in _each_batch(model, examples, groups):
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


def gradient_rows(
    model: nn.Module, examples: Sequence[Encoded], max_tokens: int
) -> dict[str, Float[Tensor, "example _"]]:
    """Return every example's gradient in float32, block by block, each flattened."""
    device = _device(model)
    rows = {
        name: torch.empty(len(examples), prod(shape), device=device)
        for name, shape in blocks(model).items()
    }
    scale = gradient_scale(model)
    groups = plan_batches(lengths_of(examples), max_tokens, MOST_EXAMPLES)
    for group, backpropagate in _each_batch(model, examples, groups):
        indices = to_device(group, device)

        def take(name: str, gradient: Tensor, indices: Tensor = indices) -> None:
            rows[name][indices] = gradient.flatten(1).float() / scale

        backpropagate(take)
    return rows


def build_basis(
    model: nn.Module,
    targets: Sequence[tuple[Sequence[Encoded], Float[np.ndarray, "_ _"]]],
    max_tokens: int,
    memory: int,
) -> Basis:
    """Return combinationᵀ G of each target, one below the other, block by block.

    `targets`: examples, and a combination (query × rank) of their gradients.

    With combination = U/σ these are the right singular vectors of G: the basis of its subspace.
    Added up in float32, in parts of a quarter of `memory` bytes, each a pass over the targets;
    kept in the model's precision on a GPU and in float32 on the CPU, within the other three.

    Raises:
        ModelError: If they fit neither into `memory` bytes of the device nor into host memory.
    """
    shapes, device = blocks(model), _device(model)
    rank = sum(combination.shape[1] for _, combination in targets)
    dtype = model.dtype if device.type == "cuda" else torch.float32
    assert isinstance(dtype, torch.dtype)
    waiting = choose_waiting(shapes, rank, dtype.itemsize, device, memory - memory // 4)
    done: dict[str, Tensor] = {}
    for part in _parts(shapes, max_bytes=memory // 4, bytes_per_parameter=_FLOAT * rank):
        sums = [
            _combine_rows(model, examples, combination, part, max_tokens)
            for examples, combination in targets
        ]
        for name in part:
            block = torch.cat([own.pop(name) for own in sums]).to(dtype)
            done[name] = block.cpu().pin_memory() if name in waiting else block
    return Basis(done, waiting, device)


def _combine_rows(
    model: nn.Module,
    examples: Sequence[Encoded],
    combination: Float[np.ndarray, "query rank"],
    shapes: Shapes,
    max_tokens: int,
) -> dict[str, Float[Tensor, "rank _"]]:
    weights = to_device(combination.astype(np.float32), _device(model)) / gradient_scale(model)
    sums = {
        name: torch.zeros(weights.shape[1], prod(shape), device=weights.device)
        for name, shape in shapes.items()
    }
    groups = plan_batches(lengths_of(examples), max_tokens)
    for group, backpropagate in _each_batch(model, examples, groups):
        shares = weights[to_device(group, weights.device)].T

        def accumulate(name: str, gradient: Tensor, shares: Tensor = shares) -> None:
            if name in sums:
                sums[name].addmm_(shares, gradient.flatten(1).float())

        backpropagate(accumulate)
    return sums


@dataclass(frozen=True)
class Projections:
    """What one pass over a range of examples yields, row by row, on the model's device."""

    coordinates: Float[Tensor, "example rank"]
    losses: Float[Tensor, " example"]
    gradient_norms: Float[Tensor, " example"]


def project(
    model: nn.Module, examples: Sequence[Encoded], max_tokens: int, basis: Basis
) -> Projections:
    """Return every example's coordinates in the basis, its loss and the norm of its gradient.

    Coordinates and squared norms are sums over blocks, accumulated in float32 while the backward
    pass is at each. Nothing here waits for the device.
    """
    device, scale = _device(model), gradient_scale(model)
    coordinates = torch.empty(len(examples), basis.rank, device=device)
    norms, losses = torch.empty(2, len(examples), device=device)
    groups = plan_batches(lengths_of(examples), max_tokens, MOST_EXAMPLES)
    for group, backpropagate in _each_batch(model, examples, groups):
        inner = torch.zeros(len(group), basis.rank, device=device)
        squares = torch.zeros(len(group), device=device)

        def contract(
            name: str, gradient: Tensor, inner: Tensor = inner, squares: Tensor = squares
        ) -> None:
            flat = gradient.flatten(1)
            inner.add_(product(flat, basis[name]))
            squares.add_(torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square_())

        indices = to_device(group, device)
        losses[indices] = backpropagate(contract)
        coordinates[indices] = inner / scale
        norms[indices] = squares.sqrt_() / scale
    return Projections(coordinates, losses, norms)


def product(
    left: Float[Tensor, "example parameter"], right: Float[Tensor, "direction parameter"]
) -> Float[Tensor, "example direction"]:
    """Return left · rightᵀ, accumulated in float32 whatever the factors' precision."""
    if left.is_cuda:
        if left.dtype == torch.float32:
            return left @ right.T
        return torch.mm(left, right.T, out_dtype=torch.float32)
    # a few rows by very many columns: cut into pieces, a CPU takes a third less time
    pieces = gcd(left.shape[1], 16)
    lefts = left.float().unflatten(1, (pieces, -1)).transpose(0, 1)
    rights = right.float().unflatten(1, (pieces, -1)).permute(1, 2, 0)
    return torch.bmm(lefts, rights).sum(0)


def _each_batch(
    model: nn.Module, examples: Sequence[Encoded], groups: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, Callable[[Consume], Float[Tensor, " batch"]]]]:
    """Yield each group with the function that runs its batch."""
    batches = lay_out(examples, groups, _device(model))
    with PerExampleGradients(model) as gradients:
        for group, batch in zip(groups, batches, strict=True):
            yield group, partial(gradients, batch)


def _parts(shapes: Shapes, max_bytes: int, bytes_per_parameter: int) -> Iterator[Shapes]:
    """Cut the blocks into parts of at most `max_bytes`, or of a single block."""
    part: dict[str, tuple[int, int]] = {}
    room = max_bytes
    for name, shape in shapes.items():
        size = prod(shape) * bytes_per_parameter
        if part and size > room:
            yield part
            part, room = {}, max_bytes
        part[name] = shape
        room -= size
    yield part


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

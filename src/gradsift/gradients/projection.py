"""Coordinates of examples in a basis, from one backward pass and in no more memory than a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.data.encoding import Encoded
from gradsift.gradients.basis import Basis
from gradsift.gradients.per_example import each_batch, gradient_scale
from gradsift.models.batches import device_of, group_examples, to_device

_CPU_PIECES = 16
# as one product, 17 gradients by 150 directions would occupy two of an H100's 132 processors
_GPU_PIECES = 64


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

    A product for each target: in a stacked one its bits would depend on the targets beside it.
    Coordinates and squared norms are sums over blocks, accumulated in float32 while the backward
    pass is at each. Nothing here waits for the device.
    """
    device, scale = device_of(model), gradient_scale(model)
    coordinates = torch.empty(len(examples), basis.rank, device=device)
    norms, losses = torch.empty(2, len(examples), device=device)
    groups = group_examples(model, examples, max_tokens)
    for group, backpropagate in each_batch(model, examples, groups):
        inner = torch.zeros(len(group), basis.rank, device=device)
        by_target = inner.split(basis.ranks, dim=1)
        squares = torch.zeros(len(group), device=device)

        def contract(
            name: str,
            gradient: Tensor,
            by_target: Sequence[Tensor] = by_target,
            squares: Tensor = squares,
        ) -> None:
            flat = gradient.flatten(1)
            for own, part in zip(by_target, basis.parts(name), strict=True):
                own.add_(product(flat, part))
            squares.add_(torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square_())

        indices = to_device(group, device)
        losses[indices] = backpropagate(contract)
        coordinates[indices] = inner / scale
        norms[indices] = squares.sqrt_() / scale
    return Projections(coordinates, losses, norms)


def product(
    left: Float[Tensor, "example parameter"], right: Float[Tensor, "direction parameter"]
) -> Float[Tensor, "example direction"]:
    """Return left · rightᵀ, accumulated in float32 whatever the factors' precision.

    A few rows by very many columns: in pieces along the columns, which are added up. A CPU takes a
    third less time so; on a GPU the whole product would be the work of a few of its processors.
    """
    on_cpu = left.device.type == "cpu"
    if on_cpu:
        left, right = left.float(), right.float()
    pieces = gcd(left.shape[1], _CPU_PIECES if on_cpu else _GPU_PIECES)
    lefts = left.unflatten(1, (pieces, -1)).transpose(0, 1)
    rights = right.unflatten(1, (pieces, -1)).permute(1, 2, 0)
    if left.dtype == torch.float32:
        return torch.bmm(lefts, rights).sum(0)
    return torch.bmm(lefts, rights, out_dtype=torch.float32).sum(0)

"""Rows times the signs of a random projection in one kernel on a GPU: no sign is ever in memory.

A program has a tile of rows and of directions, and one stretch of the parameters. It makes the
signs in registers, by the hash of `random_projection.py`, and leaves a partial sum; partial sums
are added up in a fixed order, without atomics, so that a pass repeats its bits.

The signs are exact in bfloat16, rows are not: each number is cut into the three bfloat16 numbers
whose sum it is (8 of its 24 bits in each), and each part is multiplied with the signs. So products
are exact, and they are added up in float32. TF32 has 11 bits: two parts of 22 bits at a quarter of
the speed for each.

Needs Triton, which comes with a PyTorch for CUDA, and is imported by nothing else.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int64
from torch import Tensor

_STRETCH = 4096  # parameters of a program
_STRETCHES = 32  # at once, whose partial sums are held
_WIDTH = 128  # directions of a program
_DEPTH = 32  # parameters whose signs a program makes together


def add_product(
    rows: Float[Tensor, "example parameter"],
    first: int,
    start: Int64[Tensor, ""],
    into: Float[Tensor, "example direction"],
) -> None:
    """Add to `into` the rows times k^-1/2 and the signs of the parameters from `first` on.

    `start`: the hash of the seed.
    """
    num_rows, dimension = into.shape
    height = min(max(triton.next_power_of_2(num_rows), 16), 64)
    rows = rows.contiguous()
    for begin in range(0, rows.shape[1], _STRETCH * _STRETCHES):
        size = min(rows.shape[1] - begin, _STRETCH * _STRETCHES)
        grid = triton.cdiv(dimension, _WIDTH), triton.cdiv(size, _STRETCH)
        partial = torch.empty(grid[1], num_rows, dimension, device=rows.device)
        with torch.cuda.device_of(rows):
            _multiply[*grid, triton.cdiv(num_rows, height)](  # pyright: ignore[reportIndexIssue]
                rows[:, begin:], start, partial, num_rows, size, rows.stride(0), first + begin,
                dimension, height, _WIDTH, _DEPTH, _STRETCH,
                tl.bfloat16 if rows.is_cuda else tl.float32,  # all that the interpreter multiplies
            )  # fmt: skip
        into.add_(partial.sum(0), alpha=dimension**-0.5)


@triton.jit(do_not_specialize=["first"])
@no_type_check
def _multiply(
    rows,
    start,
    partial,
    num_rows,
    num_parameters,
    stride,
    first,
    dimension: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    STRETCH: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Leave the partial sums of one stretch of parameters for a tile of rows and directions."""
    seed = tl.load(start).to(tl.uint64, bitcast=True)
    stretch = tl.program_id(1)
    row = tl.program_id(2) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for begin in range(stretch * STRETCH, min((stretch + 1) * STRETCH, num_parameters), DEPTH):
        parameter = begin + tl.arange(0, DEPTH)
        there = (row < num_rows) & (parameter < num_parameters)[None, :]
        values = tl.load(rows + row.to(tl.int64) * stride + parameter[None, :], there, other=0.0)
        signs = _make_signs(seed, first.to(tl.int64) + parameter, dimension, WIDTH, DEPTH)
        rest, products = values.to(tl.float32), tl.zeros((HEIGHT, WIDTH), tl.float32)
        for _ in tl.static_range(3):
            upper = rest.to(tl.uint32, bitcast=True) >> 16  # the eight bits that bfloat16 has
            part = upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
            products = tl.dot(part.to(FACTOR), signs.to(FACTOR), products)
            rest -= (upper << 16).to(tl.float32, bitcast=True)
        sums += products  # rounded to nearest: a tensor core's own long sums are cut off
    direction = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    place = (stretch * num_rows + row) * dimension + direction
    tl.store(partial + place, sums, (row < num_rows) & (direction < dimension))


@triton.jit
@no_type_check
def _make_signs(seed, parameter, dimension: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Return the signs of a tile's parameters and directions in bfloat16: bit j of word w is 64w+j.

    The hash is SplitMix64's, in unsigned integers, which wrap.
    """
    word = tl.program_id(0) * (WIDTH // 64) + tl.arange(0, WIDTH // 64) + 1
    place = parameter[:, None].to(tl.uint64) * (dimension // 64) + word[None, :].to(tl.uint64)
    hashed = seed + place * 0x9E3779B97F4A7C15
    hashed = (hashed ^ (hashed >> 30)) * 0xBF58476D1CE4E5B9
    hashed = (hashed ^ (hashed >> 27)) * 0x94D049BB133111EB
    hashed = hashed ^ (hashed >> 31)
    halves = tl.join(hashed.to(tl.uint32), (hashed >> 32).to(tl.uint32))
    halves = tl.reshape(halves, (DEPTH, WIDTH // 32, 1))
    bits = (halves >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
    signs = ((bits << 15) ^ 0xBF80).to(tl.uint16)  # 0x3F80 is 1 in bfloat16, 0xBF80 is -1
    return tl.reshape(signs, (DEPTH, WIDTH)).to(tl.bfloat16, bitcast=True)

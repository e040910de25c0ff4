"""Pinned host memory for many blocks, from which a GPU copies while it works."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

_ALIGNED = 512  # bytes


def pinned(shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return pinned host memory for blocks of these shapes, by their names."""
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    pieces, places = pieces_for(sizes)
    memory = [torch.empty(size // dtype.itemsize, dtype=dtype, pin_memory=True) for size in pieces]
    found = {}
    for name, (piece, start) in places.items():
        first = start // dtype.itemsize
        found[name] = memory[piece][first : first + prod(shapes[name])].view(shapes[name])
    return found


def pieces_for(sizes: Mapping[str, int]) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Lay blocks of so many bytes out in as little pinned memory as can be had for them.

    PyTorch hands it out in powers of two (CachingHostAllocator). So a piece is the largest that
    what is left fills, or the least that holds the block at hand, and a block goes into the first
    piece with room. Returns each piece's bytes, and for each block its piece and where it begins.

    >>> pieces_for({"one": 3072, "two": 3072, "three": 2048})
    ([8192], {'one': (0, 0), 'two': (0, 3072), 'three': (0, 6144)})
    """
    pieces: list[int] = []
    used: list[int] = []
    places: dict[str, tuple[int, int]] = {}
    aligned = {name: -(-size // _ALIGNED) * _ALIGNED for name, size in sizes.items()}
    left = sum(aligned.values())
    for name, size in aligned.items():
        fitting = (i for i, piece in enumerate(pieces) if used[i] + size <= piece)
        place = next(fitting, len(pieces))
        if place == len(pieces):
            pieces.append(1 << max(left.bit_length() - 1, (size - 1).bit_length()))
            used.append(0)
        places[name] = place, used[place]
        used[place] += size
        left -= size
    return pieces, places

"""A random projection with entries ±1/√k that is never held: its signs are made where needed.

Each sign is a bit of a hash of the seed and its place (SplitMix64; Steele, Lea, Flood, 2014), in
integers alone, so that every device makes the same. Inner products are kept up to an error of
about ‖x‖‖y‖/√k (Johnson and Lindenstrauss, 1984; Achlioptas, 2003).

On an NVIDIA GPU one kernel makes the signs and multiplies with them (`sign_kernel.py`), and a batch
is projected block by block in its backward pass. Elsewhere signs are made in memory and cost more
than a batch's gradients, so whole gradients of many examples are held and share them.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.data.encoding import Encoded
from gradsift.gradients.per_example import blocks, each_batch, gradient_rows, gradient_scale
from gradsift.models.batches import group_examples, to_device

Direction = Callable[[str, Float[Tensor, "example parameter"]], Float[Tensor, "example parameter"]]
"""Takes a block's name and gradients in float32, and returns what is to be projected of them."""

logger = logging.getLogger(__name__)
_WORD = 64  # signs in one hash
_MASK = (1 << _WORD) - 1
_STEP = 0x9E3779B97F4A7C15
_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_PARAMETERS_AT_ONCE = 1024  # rows of the projection that are made together


class Projection:
    """Rademacher projection of vectors of any length to `dimension` entries."""

    def __init__(self, dimension: int, seed: int, device: torch.device) -> None:
        """Take the dimension, a multiple of 64, and where the signs are to be made."""
        assert dimension % _WORD == 0, dimension
        self.dimension, self.device, self.in_kernel = dimension, device, has_kernel(device)
        self._start = _mix(torch.tensor(_signed(seed * _STEP), device=device))

    def signs(self, start: int, stop: int) -> Float[Tensor, "parameter direction"]:
        """Return the signs of some parameters, counted over the whole vector.

        >>> Projection(64, seed=0, device=torch.device("cpu")).signs(0, 1)[0, :6].tolist()
        [1.0, 1.0, 1.0, 1.0, -1.0, 1.0]
        """
        words = self.dimension // _WORD
        places = torch.arange(start * words + 1, stop * words + 1, device=self.device)
        bits = _mix(self._start + places * _signed(_STEP)).view(torch.uint8)
        return self._table[bits.int()].view(stop - start, self.dimension)

    def add(
        self,
        rows: Float[Tensor, "example parameter"],
        first: int,
        into: Float[Tensor, "example direction"],
    ) -> None:
        """Add the projection of a part of the vectors that begins at their entry `first`."""
        if self.in_kernel:
            from gradsift.gradients.sign_kernel import add_product

            add_product(rows, first, self._start, into)
            return
        for start in range(0, rows.shape[1], _PARAMETERS_AT_ONCE):
            piece = rows[:, start : start + _PARAMETERS_AT_ONCE]
            signs = self.signs(first + start, first + start + piece.shape[1])
            into.addmm_(piece, signs, alpha=self.dimension**-0.5)

    @cached_property
    def _table(self) -> Float[Tensor, "256 8"]:
        """The eight signs of every byte."""
        byte = torch.arange(256, device=self.device)[:, None]
        bits = byte.bitwise_right_shift(torch.arange(8, device=self.device)) & 1
        return bits.float() * 2 - 1


def project_at_random(
    model: nn.Module,
    examples: Sequence[Encoded],
    max_tokens: int,
    projection: Projection,
    direction: Direction,
) -> Float[Tensor, "example direction"]:
    """Return the projections of what `direction` makes of every example's gradient.

    Raises:
        ModelError: If a layer's gradient cannot be measured exactly.
    """
    shapes, scale, device = blocks(model), gradient_scale(model), projection.device
    first = dict(zip(shapes, accumulate(map(prod, shapes.values()), initial=0), strict=False))
    into = torch.zeros(len(examples), projection.dimension, device=device)
    if not projection.in_kernel:
        for name, rows in gradient_rows(model, examples, max_tokens).items():
            projection.add(direction(name, rows), first[name], into)
        return into
    groups = group_examples(model, examples, max_tokens)
    for group, backpropagate in each_batch(model, examples, groups):
        part = torch.zeros(len(group), projection.dimension, device=device)
        seen: set[str] = set()

        def take(name: str, gradient: Tensor, part: Tensor = part, seen: set[str] = seen) -> None:
            seen.add(name)
            rows = gradient.flatten(1).float() / scale
            projection.add(direction(name, rows), first[name], part)

        backpropagate(take)
        for name in (own for own in shapes if own not in seen):  # not used: a gradient of zero
            zeros = torch.zeros(len(group), prod(shapes[name]), device=device)
            projection.add(direction(name, zeros), first[name], part)
        into[to_device(group, device)] = part
    return into


@cache
def has_kernel(device: torch.device) -> bool:
    """Return whether signs are made within the product: Triton, and NVIDIA's Ampere or later.

    Without, they are the same, and sums differ by rounding alone.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):  # it multiplies no bfloat16
        return False
    named = os.getenv("CC")  # as Triton looks for it
    compilers = ("gcc", "clang") if named is None else (named,)
    there = {
        "Triton": find_spec("triton"),
        "a C compiler, which Triton calls,": any(map(shutil.which, compilers)),
        "Python.h, which Triton compiles with,": _header().exists(),
    }
    lacks = " and ".join(what for what, found in there.items() if not found)
    if lacks:
        logger.warning("%s is missing: random projections take much longer", lacks)
    return not lacks


def _header() -> Path:
    return Path(sysconfig.get_paths()["include"], "Python.h")


def _mix(words: Tensor) -> Tensor:
    """Return SplitMix64's finishing hash of 64-bit words (wrapping, so signed will do)."""
    for shift, factor in _MIXERS:
        words = words ^ (words.bitwise_right_shift(shift) & (_MASK >> shift))
        words = words * _signed(factor)
    return words


def _signed(word: int) -> int:
    """Return the 64-bit integer of the same bits, as torch has it."""
    word &= _MASK
    return word - (1 << _WORD) if word >> (_WORD - 1) else word

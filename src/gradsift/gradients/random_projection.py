"""A random projection with entries ±1/√k that is never held: its signs are made where needed.

Each sign is a bit of a hash of the seed and its place (SplitMix64; Steele, Lea, Flood, 2014), in
integers alone, so that every device makes the same. Inner products are kept up to an error of
about ‖x‖‖y‖/√k (Johnson and Lindenstrauss, 1984; Achlioptas, 2003).
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

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
        self.dimension, self._device = dimension, device
        self._start = _mix(torch.tensor(_signed(seed * _STEP), device=device))

    def signs(self, start: int, stop: int) -> Float[Tensor, "parameter direction"]:
        """Return the signs of some parameters, counted over the whole vector.

        >>> Projection(64, seed=0, device=torch.device("cpu")).signs(0, 1)[0, :6].tolist()
        [1.0, 1.0, 1.0, 1.0, -1.0, 1.0]
        """
        words = self.dimension // _WORD
        places = torch.arange(start * words + 1, stop * words + 1, device=self._device)
        bits = _mix(self._start + places * _signed(_STEP)).view(torch.uint8)
        return self._table[bits.int()].view(stop - start, self.dimension)

    def add(
        self,
        rows: Float[Tensor, "example parameter"],
        first: int,
        into: Float[Tensor, "example direction"],
    ) -> None:
        """Add the projection of a part of the vectors that begins at their entry `first`."""
        for start in range(0, rows.shape[1], _PARAMETERS_AT_ONCE):
            piece = rows[:, start : start + _PARAMETERS_AT_ONCE]
            signs = self.signs(first + start, first + start + piece.shape[1])
            into.addmm_(piece, signs, alpha=self.dimension**-0.5)

    @cached_property
    def _table(self) -> Float[Tensor, "256 8"]:
        """The eight signs of every byte."""
        byte = torch.arange(256, device=self._device)[:, None]
        bits = byte.bitwise_right_shift(torch.arange(8, device=self._device)) & 1
        return bits.float() * 2 - 1


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

"""Small value types that several folders use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

from gradsift.errors import shorten, suggest_share

FusedMethodName = Literal[
    "gist",
    "less",
    "cosine",
    "influence",
    "rds",
    "embed",
    "bm25",
    "target-path",
    "perplexity",
    "length",
    "random",
]
"""The ways to score a pool by themselves; `gradsift/methods/` has a file for each."""
MethodName = Literal[FusedMethodName, "fuse"]
"""All ways to score a pool: those, and their fusion."""


_BUDGET = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*(%|[kKMG]?tok)?")
_SCALE = {"tok": 1, "ktok": 10**3, "Ktok": 10**3, "Mtok": 10**6, "Gtok": 10**9}


@dataclass(frozen=True)
class Budget:
    """How much may be picked: a share of the pool, a count of examples, or tokens.

    >>> Budget.parse("5%"), str(Budget.parse("3Mtok"))
    (Budget(amount=Decimal('5'), unit='%'), '3000000tok')
    """

    amount: Decimal
    unit: Literal["%", "examples", "tok"]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `5%`, `2000` or `3Mtok`.

        Raises:
            ValueError: If the text is none of these, or nothing or more than all is asked for.
        """
        match = _BUDGET.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"expected a share (5%), a count (2000) or tokens (3Mtok), found "
                f"{shorten(repr(text))}{suggest_share(text)}"
            )
        amount, unit = Decimal(match[1]), match[2]
        if unit in _SCALE:
            amount, unit = amount * _SCALE[unit], "tok"
        if amount == 0 or (unit == "%" and amount > 100):
            raise ValueError(f"a budget is above 0 and at most the whole pool, found {text!r}")
        if unit != "%" and amount != amount.to_integral_value():
            found = f"{text!r}{suggest_share(text)}"
            raise ValueError(f"a budget of examples or tokens is a whole number, found {found}")
        return cls(amount, unit or "examples")  # type: ignore[arg-type]

    @property
    def in_words(self) -> str:
        """What is asked for, to be read: `5% of the pool`, `2,000 examples`."""
        if self.unit == "%":
            return f"{self} of the pool"
        return f"{int(self.amount):,} {'tokens' if self.unit == 'tok' else 'examples'}"

    def __str__(self) -> str:
        if self.unit == "%":
            return f"{self.amount:f}%"
        return f"{int(self.amount)}{'tok' if self.unit == 'tok' else ''}"


@dataclass(frozen=True)
class Checkpoint:
    """An adapter (a PEFT folder) at which gradients are measured.

    `weight` is its share in the score; over the checkpoints of a run they sum to 1.
    """

    label: str
    path: Path
    weight: float

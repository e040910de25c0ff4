"""One row of any file: the place it came from, its bytes, its value or what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradsift.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row as it came in: `value` where it is a JSON object, else `problem`.

    `line` counts from 1; `raw` holds the row's own bytes (JSON Lines) or its JSON.
    """

    file: str
    line: int
    raw: bytes
    value: dict[str, Any] | None = None
    problem: str | None = None


def check_names(name: str, columns: Sequence[str]) -> None:
    """Make sure that no two columns of a file have one name; spreadsheets leave some without any.

    Raises:
        DataError: If two have.
    """
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise DataError(f"{name} has the column {twice[0]!r} twice; rename or remove one of them")

"""One row of any file: the place it came from, its bytes, its value or what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gradsift.errors import DataError, shorten

_DEEPEST = 100  # brackets inside each other in one row: other readers give up soon after


@dataclass(frozen=True)
class Row:
    """One row as it came in: `value` where it is a JSON object, else `problem`.

    `line` counts from 1; `raw` holds the row's own bytes (JSON Lines) or its JSON, which is parsed
    where it is asked for, perhaps in another process. `unreadable`: what its file's reader found
    wrong with it.
    """

    file: str
    line: int
    raw: bytes
    unreadable: str | None = None

    @cached_property
    def _parsed(self) -> dict[str, Any] | str:
        return self.unreadable or _parse(self.raw)

    @property
    def value(self) -> dict[str, Any] | None:
        """The row's fields, if it can be read."""
        return self._parsed if isinstance(self._parsed, dict) else None

    @property
    def problem(self) -> str | None:
        """Why the row cannot be read, if so."""
        return self._parsed if isinstance(self._parsed, str) else None


def check_names(name: str, columns: Sequence[str]) -> None:
    """Make sure that no two columns of a file have one name; spreadsheets leave some without any.

    Raises:
        DataError: If two have.
    """
    twice = sorted({column for column in columns if column and columns.count(column) > 1})
    if twice:
        raise DataError(f"{name} has the column {twice[0]!r} twice; rename or remove one of them")


def _parse(raw: bytes) -> dict[str, Any] | str:
    """Return the object that a row's JSON is, or what is wrong with it."""
    try:
        # decoded first: JSON readers guess at encodings, and other readers guess differently
        value = json.loads(
            raw.decode(), parse_constant=_no_number, object_pairs_hook=_each_key_once
        )
        if b"\\u" in raw:  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at column {error.colno}"
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 at byte {error.start}"
    except UnicodeEncodeError:
        problem = "not valid Unicode: half of a surrogate pair"
    except RecursionError:
        problem = f"nested deeper than {_DEEPEST} levels"
    except ValueError as error:
        problem = f"not readable JSON: {error}"
    else:
        if not isinstance(value, dict):
            problem = f"expected a JSON object, found {type(value).__name__}"
        elif raw.count(b"[") + raw.count(b"{") > _DEEPEST and _depth(value) > _DEEPEST:
            problem = f"nested deeper than {_DEEPEST} levels"
        else:
            return value
    return problem


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value; write null")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shorten(repr(twice), 60)} stands twice in an object")
    return value


def _depth(value: Any) -> int:
    """Return how many lists and objects lie inside each other, at most."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [item for item in inner if isinstance(item, dict | list)]
    return depth

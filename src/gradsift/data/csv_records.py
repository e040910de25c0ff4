"""The records of a CSV or TSV file; one that is broken costs itself, not the file.

A record ends at the first end of a line outside quotes, so quoted fields may hold line breaks.
Where a quoted field is not closed (in the file, or within `LONGEST_RECORD` characters), or other
text follows its closing quote, nobody can know where the record was meant to end: it costs the line
where it begins, and reading goes on at the next line. So it does where a record has too many or too
few fields and an odd number of quotes: a stray one has swallowed lines. With an even number such a
record costs itself, all its lines. Bytes that are no UTF-8 cost the record that they stand in.

The standard library reads them, because text must stay text ("007" is no number, "NA" no gap).
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec

from gradsift.data.rows import Row, check_names
from gradsift.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LONGEST_RECORD = 1 << 24  # characters in which an opened quote must be closed; so much is in memory
_UNDECODED = "surrogateescape"  # keeps bytes that are no UTF-8 as half surrogates


def read_csv(name: str) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file, all values as text; `line` is where a row begins.

    Raises:
        DataError: If it is no such file, or its header cannot be read.
    """
    separator = next(SEPARATORS[s] for s in reversed(Path(name).suffixes) if s in SEPARATORS)
    csv.field_size_limit(1 << 30)  # the default of 128 KB is less than many a document
    with fsspec.open(
        name, "rt", compression="infer", encoding="utf-8-sig", errors=_UNDECODED, newline=""
    ) as file:
        header: list[str] | None = None
        for number, lines, found in _Records(file, separator):  # type: ignore[arg-type]
            if header is None:
                if isinstance(found, str):
                    raise DataError(f"{name}:{number}: the header cannot be read: {found}")
                check_names(name, header := found)
            elif isinstance(found, str):
                yield Row(name, number, _bytes(lines), unreadable=found)
            else:
                value = dict(zip(header, found, strict=True))
                yield Row(name, number, json.dumps(value, ensure_ascii=False).encode())


class _Records:
    """The records of some lines: where each begins, its lines, and its fields or what is wrong.

    The first is the header; all others are to have as many fields.
    """

    def __init__(self, lines: Iterable[str], separator: str) -> None:
        self._lines, self._separator = iter(lines), separator
        self._again: deque[str] = deque()  # lines that a broken record took, to be read once more
        self._taken: list[str] = []
        self._width: int | None = None

    def __iter__(self) -> Iterator[tuple[int, list[str], list[str] | str]]:
        number = 1
        while (found := self._next()) is not None:
            if found:  # else a blank line
                yield number, self._taken, found
            number += len(self._taken)

    def _next(self) -> list[str] | str | None:
        """Return the fields of the next record or its problem; none at the end."""
        self._taken = []
        try:
            fields = next(csv.reader(self._take(), delimiter=self._separator, strict=True), None)
        except csv.Error as error:
            self._give_back()
            return _in_words(error)
        if not fields:
            return fields
        try:
            _bytes(self._taken).decode()
        except UnicodeDecodeError as error:
            return f"not valid UTF-8 at byte {error.start}"
        self._width = self._width or len(fields)
        if len(fields) != self._width:
            if sum(line.count('"') for line in self._taken) % 2:  # one of them is stray
                self._give_back()
            return f"expected {self._width} fields as in the header, found {len(fields)}"
        return fields

    def _take(self) -> Iterator[str]:
        size = 0
        while line := self._again.popleft() if self._again else next(self._lines, ""):
            self._taken.append(line)
            yield line
            size += len(line)
            if size > LONGEST_RECORD:
                raise csv.Error(
                    f"a quoted field is not closed within {LONGEST_RECORD:,} characters"
                )

    def _give_back(self) -> None:
        """Leave a broken record its first line; the others are read on their own."""
        self._again.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]


def _bytes(lines: Iterable[str]) -> bytes:
    return "".join(lines).encode(errors=_UNDECODED)


def _in_words(error: csv.Error) -> str:
    """Return what is wrong with the quotes of a record, and how they are to be."""
    problem = str(error)
    if "end of data" in problem:
        problem = "a quoted field is not closed before the end of the file"
    elif "expected after" in problem:
        problem = "other text follows the closing quote of a field"
    return f'{problem}; a quote inside a quoted field is written twice: ""'

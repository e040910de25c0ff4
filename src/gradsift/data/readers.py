"""The rows of files, one reader for each kind, each row with the place it came from and its bytes.

JSON Lines are read line by line, because a broken line must be named and the others kept, and
because picks are written back byte for byte; Parquet by PyArrow; what `save_to_disk` wrote and the
Hub through `datasets`, which runs no code of a data set since its version 4. CSV files are read in
`csv_records.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec

from gradsift.data.rows import Row, check_names
from gradsift.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROWS_AT_ONCE = 1024
_NO_VALUE = "it has NaN or Infinity, which are no JSON, or a key that stands twice in an object"


def read_lines(name: str) -> Iterator[Row]:
    """Yield the lines of a file of JSON objects, blank ones left out."""
    with fsspec.open(name, "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):  # type: ignore[arg-type]
            raw = line.removesuffix(b"\n")
            if number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if raw.strip():
                yield Row(name, number, raw)


def _marked_if_twice(pairs: list[tuple[str, Any]]) -> Any:
    """Return the object, or what JSON has no form for, so that its row alone is rejected."""
    value = dict(pairs)
    return value if len(value) == len(pairs) else math.nan


def read_json(name: str) -> Iterator[Row]:
    """Yield the elements of a JSON array, or the lines of a JSON Lines file under another name.

    Raises:
        DataError: If it is an array, but no valid JSON.
    """
    with fsspec.open(name, "rb", compression="infer") as file:
        start = b""
        while not start and (piece := file.read(4096)):  # type: ignore[union-attr]
            start = piece.removeprefix(_BYTE_ORDER_MARK).lstrip()  # type: ignore[union-attr]
        if not start.startswith(b"["):
            yield from read_lines(name)
            return
        file.seek(0)  # type: ignore[union-attr]
        content: bytes = file.read()  # type: ignore[union-attr, assignment]
    try:
        text = content.removeprefix(_BYTE_ORDER_MARK).decode()
        values = json.loads(text, object_pairs_hook=_marked_if_twice)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not valid JSON: {error}") from None
    for number, value in enumerate(values, start=1):
        try:
            raw = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raw = as_json(value)
            yield Row(name, number, raw, unreadable=_NO_VALUE)
        else:
            yield Row(name, number, raw.encode("utf-8", "surrogatepass"))


def read_parquet(name: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: If it is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(name) as file:
            check_names(name, file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(name, number, as_json(value))
    except (pa.ArrowException, OverflowError) as error:  # dates beyond Python's
        raise DataError(f"cannot read {name!r} after row {number}: {error}") from error


def read_table(name: str, values: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows of a data set that is read by somebody else."""
    for number, value in enumerate(values, start=1):
        yield Row(name, number, as_json(value))


def stored_values(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set of `datasets` as they are stored: no picture is decoded."""
    for table in data.with_format("arrow").iter(_ROWS_AT_ONCE):
        yield from table.to_pylist()


def as_json(value: Any) -> bytes:
    """Return a value of a table as JSON; what JSON has no form for is null or text."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(value), ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Which schema a file has: that of its first readable row; found before anything is encoded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import fsspec

from gradsift.data.conversations import EXPECTED, detect
from gradsift.data.readers import read_lines
from gradsift.data.rows import Row, check_names
from gradsift.data.sources import Source, reading
from gradsift.errors import DataError, shorten, suggest

_ROWS_LOOKED_AT = 100
_LOOKED_AT = 1 << 20  # bytes of a JSON array
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
_COMPLETIONS = ("completion", "output", "response", "answer", "solution")
_EMPTY = {
    "json": "it holds an empty list or nothing",
    "csv": "it has no row below a header",
    "parquet": "it has columns and no row",
}


def check_schemas(sources: Iterable[Source], columns: Mapping[str, str]) -> None:
    """Find out whether sources can be read and have a known schema, from their first rows alone.

    Of Parquet the columns are read; of a JSON array the first element, if it ends within the first
    megabyte; of a Hub data set nothing, because it would be sent twice.

    Raises:
        DataError: If one cannot be read or has no known schema.
    """
    for source in sources:
        with reading(source.name):
            row = next((row for row in _first_rows(source) if row.value is not None), None)
        if row is not None:
            find_schema(row, columns)


def find_schema(row: Row, columns: Mapping[str, str]) -> str:
    """Return the schema of the file whose first readable row this is.

    Raises:
        DataError: If it is none that is known.
    """
    assert row.value is not None, "a row that could not be read says nothing of its file"
    schema = detect(row.value, columns)
    if schema is None:
        found = shorten(", ".join(row.value)) or "(none)"
        hint = describe_lacking(row, columns) or ("" if columns else _suggest_mapping(row.value))
        raise DataError(
            f"{row.file}:{row.line}: no known schema; expected {EXPECTED}; found the columns "
            f"{found}{hint and '; '}{hint}"
        )
    return schema


def describe_lacking(row: Row, columns: Mapping[str, str]) -> str:
    """Return which mapped columns a row lacks, with the nearest that it has; nothing if none."""
    has = row.value or {}
    return ", ".join(
        f"no column {name!r} as mapped by data.columns.{field}{suggest(name, has)}"
        for field, name in columns.items()
        if name not in has
    )


def describe_empty(source: Source) -> str:
    """Return in what way a source without rows is empty."""
    path = Path(source.name)
    if path.is_file() and path.stat().st_size == 0:
        return "the file has no content"
    return _EMPTY.get(source.kind, "it has no row")


def _suggest_mapping(names: Iterable[str]) -> str:
    """Return the settings that would map columns whose names say plainly what they hold."""
    by_case = {name.casefold(): name for name in names}
    if turns := [
        by_case[n] for n in ("message", "messages", "conversation", "turns", "chat") if n in by_case
    ]:
        return f"perhaps {_mapping('messages', turns[0])}"
    prompts = [by_case[name] for name in _PROMPTS if name in by_case]
    completions = [by_case[name] for name in _COMPLETIONS if name in by_case]
    if len(prompts) != 1 or len(completions) != 1:
        return ""  # which of them is meant is not plain
    prompt, completion = prompts[0], completions[0]
    return f"perhaps {_mapping('prompt', prompt)} {_mapping('completion', completion)}"


def _mapping(field: str, column: str) -> str:
    return f"--set {shlex.quote(f'data.columns.{field}={column}')}"


def _first_rows(source: Source) -> Iterator[Row]:
    """Return what can be read of a source at once, whatever its size."""
    if source.kind == "hub":
        return iter(())
    if source.kind == "parquet":
        return _columns_of_parquet(source.name)
    rows = _first_of_json(source.name) if source.kind == "json" else source.rows()
    return islice(rows, _ROWS_LOOKED_AT)


def _columns_of_parquet(name: str) -> Iterator[Row]:
    """Yield a row without values if there is any: its columns are all that tells the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(name) as file:
            columns, num_rows = file.schema_arrow.names, file.metadata.num_rows
    except pa.ArrowException as error:
        raise DataError(f"cannot read {name!r}: {error}") from error
    check_names(name, columns)
    if num_rows:
        yield Row(name, 1, json.dumps(dict.fromkeys(columns)).encode())


def _first_of_json(name: str) -> Iterator[Row]:
    """Yield the first element of an array, or the lines of a file that is none."""
    with fsspec.open(name, "rb", compression="infer") as file:
        text = file.read(_LOOKED_AT).decode("utf-8-sig", "replace").lstrip()  # type: ignore[union-attr]
    if not text.startswith("["):
        yield from read_lines(name)
        return
    try:
        value, _ = json.JSONDecoder().raw_decode(text[1:].lstrip())
    except (ValueError, RecursionError):
        return  # too long, or broken: the whole file will tell
    yield Row(name, 1, json.dumps(value).encode())

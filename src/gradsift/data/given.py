"""Pool and targets that are held in memory, written to files so that a run can be gone on with.

A file is named by what it holds, so that another pool of the same run never takes its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from gradsift.data.readers import as_json, stored_values
from gradsift.errors import ConfigError, DataError, shorten
from gradsift.policy_config import check_file_name
from gradsift.runs import layout
from gradsift.runs.atomic import room_for

Data = Any
"""Pool or target: one or more paths, a `datasets.Dataset`, a list of dicts, a table."""
_EXPECTED = "paths, a datasets.Dataset, a list of dicts, or a table of pandas or Arrow"


def keep_given(given: Any, what: str, folder: Path) -> Any:
    """Return what stands in the settings for a pool or target: paths, of what is in memory too.

    `what`: the name of the file that rows in memory are written to, in `folder`.

    Raises:
        ConfigError: If no file can have that name.
        DataError: If it is neither paths nor rows.
    """
    if isinstance(given, str | Path) or _is_list(given, str | Path):
        return given
    try:
        check_file_name(what, "target")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    rows, digest = _rows(given, what), hashlib.sha256()
    place = folder / layout.GIVEN
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place) as scratch, room_for(place):
        written = Path(scratch) / f"{what}.jsonl"
        with written.open("wb") as file:
            for row in rows:
                line = as_json(row) + b"\n"
                digest.update(line)
                file.write(line)
        whole = place / digest.hexdigest()[:16] / written.name
        whole.parent.mkdir(exist_ok=True)
        written.replace(whole)
    return str(whole)


def keep_targets(given: Any, folder: Path) -> Any:
    """Return what stands in the settings for targets, by name or one without a name.

    Raises:
        DataError: If one is neither paths nor rows.
    """
    if isinstance(given, Mapping):
        return {name: keep_given(data, name, folder) for name, data in given.items()}
    kept = keep_given(given, "target", folder)
    return kept if kept is given else {"target": kept}


def _rows(given: Any, what: str) -> Iterator[Mapping[str, Any]]:
    """Return the rows of a table or list.

    Raises:
        DataError: If it is neither.
    """
    if hasattr(given, "num_rows") and hasattr(given, "keys"):  # a DatasetDict
        splits = ", ".join(map(repr, given.keys()))
        raise DataError(f"{what}: expected one split of a data set, found all of {splits}")
    if hasattr(given, "with_format") and hasattr(given, "iter"):  # of `datasets`
        return stored_values(given)
    if hasattr(given, "reset_index"):  # of pandas, whose index is no column
        given = given.reset_index(drop=True)
    if hasattr(given, "__arrow_c_stream__"):
        batches = pa.RecordBatchReader.from_stream(given)
        return (row for batch in batches for row in batch.to_pylist())
    if _is_list(given, Mapping):
        return iter(given)
    found = f"{type(given).__name__}: {shorten(repr(given), 100)}"
    raise DataError(f"{what}: expected {_EXPECTED}, found {found}")


def _is_list(given: Any, kind: Any) -> bool:
    is_list = isinstance(given, list | tuple) and len(given) > 0
    return is_list and all(isinstance(element, kind) for element in given)

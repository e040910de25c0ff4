"""Rows of files, folders and Hub data sets, each with the place it came from and its bytes.

JSON Lines are read here, line by line, because a broken line must be named and the others kept, and
because picks are written back byte for byte; CSV by the standard library, because there text must
stay text ("007" is no number, "NA" no gap); Parquet by PyArrow; what `save_to_disk` wrote and the
Hub through `datasets`, which runs no code of a data set since its version 4.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import logging
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.compression import available_compressions

from gradsift.errors import DataError

logger = logging.getLogger(__name__)

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINES = (".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_KNOWN = (*_LINES, ".json", *_SEPARATORS, ".parquet")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # of data sets, beside their files
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` leaves
_DEEPEST = 100  # brackets inside each other in one row: other readers give up soon after
_ROWS_AT_ONCE = 1024
_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


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


@dataclass(frozen=True)
class Source:
    """One file, folder or Hub data set."""

    name: str
    kind: Literal["lines", "json", "csv", "parquet", "folder", "hub"]

    @property
    def stem(self) -> str:
        """The name that its rows have as `source` where they name none."""
        match = _HUB.fullmatch(self.name) if self.kind == "hub" else None
        if match is not None:
            return match["id"].partition("/")[2]
        path = Path(self.name)
        while self.kind != "folder" and path.suffix in (*_COMPRESSED, *_KNOWN):
            path = path.with_suffix("")
        return path.name

    def fingerprint(self) -> str:
        """Return a hash of the content; for a Hub data set, its name."""
        if self.kind == "hub":
            return self.name
        files = sorted(Path(self.name).rglob("*")) if self.kind == "folder" else [Path(self.name)]
        digest = hashlib.sha256()
        for path in filter(Path.is_file, files):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """Yield every row in order.

        Raises:
            DataError: If the whole source cannot be read.
        """
        readers = {
            "lines": _read_lines,
            "json": _read_json,
            "csv": _read_csv,
            "parquet": _read_parquet,
        }
        try:
            if self.kind in readers:
                yield from readers[self.kind](self.name)
            else:
                yield from _read_data_set(self)
        except RecursionError:
            raise DataError(f"cannot read {self.name!r}: a row is nested too deep") from None
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"cannot read {self.name!r}: {error}") from error


def resolve(specs: Iterable[str]) -> list[Source]:
    """Return the sources that paths, globs, folders and Hub ids stand for, in order.

    A folder is every data file in it and in its subfolders, sorted, or what `save_to_disk` wrote;
    `FOLDER:split` and `org/name[/config][:split]` name a split, `:all` takes all.

    Raises:
        DataError: If nothing is there, or a file's kind is unknown.
    """
    return [source for spec in specs for source in _resolve(spec)]


def log_what_is_left(specs: Iterable[str]) -> None:
    """Say of each folder which files were taken as data, and which were left."""
    for spec in specs:
        found = [spec] if Path(spec).exists() else glob.glob(spec, recursive=True)  # noqa: PTH207
        for folder in sorted(path for path in found if Path(path).is_dir()):
            taken, left = _inside(folder)
            logger.info("%s: taken: %s", folder, _named([s.name for s in taken], folder))
            if left:
                logger.warning("%s: left: %s", folder, _named(left, folder))


def _named(paths: Iterable[str], folder: str) -> str:
    names = [str(Path(path).relative_to(folder)) for path in paths]
    return ", ".join("the data set saved there" if name == "." else name for name in names)


def _resolve(spec: str) -> list[Source]:
    if glob.has_magic(spec) and not Path(spec).exists():
        names = sorted(_matches(spec))
        if not names:
            raise DataError(f"no file matches {spec!r}")
        return [source for name in names for source in _local(name)]
    if Path(spec).exists():
        return _local(spec)
    folder, _, split = spec.rpartition(":")
    if folder and (Path(folder) / _SAVED_SPLITS).is_file():
        return _saved_splits(folder, split)[0]
    suffixes = Path(spec).suffixes
    if _HUB.fullmatch(spec) and not {*suffixes} & {*_KNOWN}:
        return [Source(spec, "hub")]
    raise DataError(f"no such file: {spec!r} (looked in {Path.cwd()})")


def _matches(pattern: str) -> list[str]:
    """Return what matches; a folder on the way that may not be read is no reason for silence."""
    for parent in Path(pattern).parents:
        for name in glob.glob(str(parent), recursive=True):  # noqa: PTH207 (absolute ones too)
            if Path(name).is_dir():
                _listed(name)
    return glob.glob(pattern, recursive=True)  # noqa: PTH207


def _listed(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder!r}: {error.strerror}") from None


def _local(name: str) -> list[Source]:
    if not Path(name).is_dir():
        return [_file(name)]
    taken, left = _inside(name)
    if not taken:
        found = ", ".join(sorted(Path(path).name for path in left)[:10])
        raise DataError(
            f"the folder {name!r} has no data file; expected some of {', '.join(_KNOWN)}, or what "
            f"`save_to_disk` writes; found {found or 'nothing'}"
        )
    return taken


def _inside(folder: str, above: frozenset[str] = frozenset()) -> tuple[list[Source], list[str]]:
    """Return the sources in a folder and the names of the files that are none, both sorted."""
    if (Path(folder) / _SAVED).is_file() and (Path(folder) / _DESCRIPTIONS[0]).is_file():
        return [Source(folder, "folder")], []
    if (Path(folder) / _SAVED_SPLITS).is_file():
        return _saved_splits(folder, None)
    taken, left = [], []
    real = os.path.realpath(folder)
    for entry in _listed(folder):
        if entry.is_dir():
            if entry.name.startswith(".") or os.path.realpath(entry.path) in {*above, real}:
                left.append(entry.path)
                continue
            inner = _inside(entry.path, above | {real})
            taken += inner[0]
            left += inner[1]
        elif entry.name.startswith(".") or entry.name in _DESCRIPTIONS or not _kind(entry.name):
            left.append(entry.path)
        else:
            taken.append(_file(entry.path))
    return taken, left


def _saved_splits(folder: str, wanted: str | None) -> tuple[list[Source], list[str]]:
    """Return the splits of a `DatasetDict` on disk that are to be taken, and the others' paths.

    To be taken: the one named, `all`, or `train`.
    """
    try:
        names = json.loads((Path(folder) / _SAVED_SPLITS).read_text(encoding="utf-8"))["splits"]
        paths = {str(name): f"{folder.rstrip('/')}/{name}" for name in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"cannot read the splits of {folder!r}: {error}") from None
    chosen = _chosen(folder, [*paths], wanted)
    left = [path for name, path in paths.items() if name not in chosen]
    return [Source(paths[name], "folder") for name in chosen], left


def _chosen(name: str, splits: list[str], wanted: str | None) -> list[str]:
    """Return the splits to take: the one named, `all`, else `train` or the only one."""
    if wanted == "all" and "all" not in splits:
        return splits
    default = "train" if "train" in splits or len(splits) != 1 else splits[0]
    if (wanted or default) not in splits:
        raise DataError(
            f"{name!r} has the splits {', '.join(splits)}; name one as {name}:SPLIT, or {name}:all"
        )
    return [wanted or default]


def _kind(name: str) -> Literal["lines", "json", "csv", "parquet"] | None:
    """Return what a file of this name holds, nothing if it is no data file."""
    suffixes = Path(name).suffixes
    suffix = next((s for s in reversed(suffixes) if s not in _COMPRESSED), "")
    if suffix in _LINES:
        return "lines"
    if suffix == ".json":
        return "json"
    if suffix in _SEPARATORS:
        return "csv"
    return "parquet" if Path(name).suffix == ".parquet" else None


def _file(name: str) -> Source:
    """Return a file as a source.

    Raises:
        DataError: If it is of an unknown kind, or its name or compression cannot be read.
    """
    kind = _kind(name)
    if kind is None:
        raise DataError(
            f"{name!r} is of an unknown kind; expected a folder or one of {', '.join(_KNOWN)}"
        )
    if Path(name).suffix == ".zst" and "zstd" not in available_compressions():
        raise DataError(f"reading {name!r} needs zstandard: pip install zstandard")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the file name {name!r} is not UTF-8; rename the file") from None
    return Source(name, kind)


def _read_lines(name: str) -> Iterator[Row]:
    with fsspec.open(name, "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):  # type: ignore[arg-type]
            raw = line.removesuffix(b"\n")
            if number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if raw.strip():
                yield _parse(name, number, raw)


def _parse(name: str, number: int, raw: bytes) -> Row:
    try:
        # decoded first: JSON readers guess at encodings, and other readers guess differently
        value = json.loads(raw.decode(), parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
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
            return Row(name, number, raw, value)
    return Row(name, number, raw, problem=problem)


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value; write null")


def _depth(value: Any) -> int:
    """Return how many lists and objects lie inside each other, at most."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [item for item in inner if isinstance(item, dict | list)]
    return depth


def _read_json(name: str) -> Iterator[Row]:
    """Yield the elements of a JSON array, or the lines of a JSON Lines file under another name."""
    with fsspec.open(name, "rb", compression="infer") as file:
        start = file.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()  # type: ignore[union-attr]
        if not start.startswith(b"["):
            yield from _read_lines(name)
            return
        file.seek(0)  # type: ignore[union-attr]
        content: bytes = file.read()  # type: ignore[union-attr, assignment]
    try:
        values = json.loads(content.removeprefix(_BYTE_ORDER_MARK).decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not valid JSON: {error}") from None
    for number, value in enumerate(values, start=1):
        yield _parse(name, number, _as_json(value))


def _read_csv(name: str) -> Iterator[Row]:
    separator = next(mark for suffix, mark in _SEPARATORS.items() if suffix in Path(name).suffixes)
    csv.field_size_limit(1 << 30)  # the default of 128 KB is less than many a document
    with fsspec.open(name, "rt", compression="infer", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=separator, strict=True)  # type: ignore[arg-type]
        try:
            for value in reader:
                raw = json.dumps(value, ensure_ascii=False, default=str).encode()
                if None in value or None in value.values():
                    problem = f"expected {len(reader.fieldnames or ())} fields as in the header"
                    yield Row(name, reader.line_num, raw, problem=problem)
                else:
                    yield Row(name, reader.line_num, raw, value)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{name}:{reader.line_num + 1}: {error}") from None


def _read_parquet(name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(name) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for value in batch.to_pylist():
                    number += 1
                    yield _parse(name, number, _as_json(value))
    except pa.ArrowException as error:
        raise DataError(f"cannot read {name!r}: {error}") from error


def _read_data_set(source: Source) -> Iterator[Row]:
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        for number, value in enumerate(_load(source), start=1):
            yield _parse(source.name, number, _as_json(value))
    except (pa.ArrowException, DatasetsError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(f"cannot read {source.name!r}: {error}") from error


def _load(source: Source) -> Iterator[dict[str, Any]]:
    import datasets

    if source.kind == "folder":
        yield from datasets.load_from_disk(source.name)  # type: ignore[misc]
        return
    match = _HUB.fullmatch(source.name)
    assert match is not None, "only such names are of the Hub"
    found: dict[str, Any] = datasets.load_dataset(  # type: ignore[assignment]
        match["id"], match["config"], streaming=True
    )
    name = "/".join(filter(None, match.group("id", "config")))
    chosen = _chosen(name, [*found], match["split"])
    logger.info("%s: split %s of %s", name, ", ".join(chosen), ", ".join(found))
    for split in chosen:
        yield from found[split]


def _as_json(value: Any) -> bytes:
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

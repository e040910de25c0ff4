"""Rows of files, folders and Hub data sets, each with the place it came from and its bytes.

JSON Lines are read here, line by line, because a broken line must be named and the others kept, and
because picks are written back byte for byte; CSV by the standard library, because there text must
stay text ("007" is no number, "NA" no gap); everything else goes through `datasets`.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.compression import available_compressions

from gradsift.errors import DataError

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINES = (".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_KNOWN = (*_LINES, ".json", *_SEPARATORS, ".parquet")
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
        readers = {"lines": _read_lines, "json": _read_json, "csv": _read_csv}
        try:
            if self.kind in readers:
                yield from readers[self.kind](self.name)
            else:
                yield from _read_data_set(self)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"cannot read {self.name!r}: {error}") from error


def resolve(specs: Iterable[str]) -> list[Source]:
    """Return the sources that paths, globs and Hub ids (`org/name[/config][:split]`) stand for.

    Raises:
        DataError: If nothing is there, or a file's kind is unknown.
    """
    return [source for spec in specs for source in _resolve(spec)]


def _resolve(spec: str) -> list[Source]:
    if glob.has_magic(spec) and not Path(spec).exists():
        names = sorted(glob.glob(spec, recursive=True))  # noqa: PTH207 (absolute patterns too)
        if not names:
            raise DataError(f"no file matches {spec!r}")
        return [_local(name) for name in names]
    if Path(spec).exists():
        return [_local(spec)]
    suffixes = Path(spec).suffixes
    if _HUB.fullmatch(spec) and not {*suffixes} & {*_KNOWN}:
        return [Source(spec, "hub")]
    raise DataError(f"no such file: {spec!r} (looked in {Path.cwd()})")


def _local(name: str) -> Source:
    path = Path(name)
    if path.is_dir():
        return Source(name, "folder")
    if path.suffix == ".zst" and "zstd" not in available_compressions():
        raise DataError(f"reading {name!r} needs zstandard: pip install zstandard")
    suffix = next((s for s in reversed(path.suffixes) if s not in _COMPRESSED), "")
    if suffix in _LINES:
        return Source(name, "lines")
    if suffix == ".json":
        return Source(name, "json")
    if suffix in _SEPARATORS:
        return Source(name, "csv")
    if path.suffix == ".parquet":
        return Source(name, "parquet")
    raise DataError(
        f"{name!r} is of an unknown kind; expected a folder or one of {', '.join(_KNOWN)}"
    )


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
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except json.JSONDecodeError as error:
        return Row(
            name, number, raw, problem=f"not valid JSON: {error.msg} at column {error.colno}"
        )
    except UnicodeDecodeError as error:
        return Row(name, number, raw, problem=f"not valid UTF-8 at byte {error.start}")
    except UnicodeEncodeError:
        return Row(name, number, raw, problem="not valid Unicode: half of a surrogate pair")
    except (ValueError, RecursionError) as error:
        return Row(name, number, raw, problem=f"not readable JSON: {error}")
    if not isinstance(value, dict):
        problem = f"expected a JSON object, found {type(value).__name__}"
        return Row(name, number, raw, problem=problem)
    return Row(name, number, raw, value)


def _read_json(name: str) -> Iterator[Row]:
    """Yield the elements of a JSON array, or the lines of a JSON Lines file under another name."""
    with fsspec.open(name, "rb", compression="infer") as file:
        start = file.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()  # type: ignore[union-attr]
        if not start.startswith(b"["):
            yield from _read_lines(name)
            return
        file.seek(0)  # type: ignore[union-attr]
        try:
            values = json.load(file)  # type: ignore[arg-type]
        except ValueError as error:
            raise DataError(f"{name} is not valid JSON: {error}") from None
    for number, value in enumerate(values, start=1):
        raw = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        yield _parse(name, number, raw)


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


def _read_data_set(source: Source) -> Iterator[Row]:
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        for number, value in enumerate(_load(source), start=1):
            raw = json.dumps(value, ensure_ascii=False, default=str).encode()
            yield Row(source.name, number, raw, value)
    except (pa.ArrowException, DatasetsError) as error:
        raise DataError(f"cannot read {source.name!r}: {error}") from error


def _load(source: Source) -> Iterable[dict[str, Any]]:
    import datasets

    if source.kind == "parquet":
        return datasets.load_dataset(
            "parquet", data_files=glob.escape(source.name), split="train", streaming=True
        )
    if source.kind == "folder" and (Path(source.name) / "state.json").exists():
        return datasets.load_from_disk(source.name)  # type: ignore[return-value]
    match = _HUB.fullmatch(source.name) if source.kind == "hub" else None
    name = match["id"] if match else source.name
    splits = datasets.load_dataset(name, match["config"] if match else None, streaming=True)
    wanted = (match and match["split"]) or ("train" if "train" in splits else None)
    if wanted is None and len(splits) == 1:
        wanted = next(iter(splits))
    if wanted is None or wanted not in splits:
        raise DataError(f"{source.name!r} has the splits {[*splits]}; name one as {name}:SPLIT")
    return splits[wanted]

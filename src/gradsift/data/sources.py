"""Files, folders and Hub data sets that hold a pool or target, in the order of their rows."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from fsspec.compression import available_compressions

from gradsift.data.csv_records import SEPARATORS, read_csv
from gradsift.data.readers import read_json, read_lines, read_parquet, read_table, stored_values
from gradsift.data.rows import Row
from gradsift.errors import DataError

logger = logging.getLogger(__name__)

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_LINES = (".jsonl", ".ndjson")
_KNOWN = (*_LINES, ".json", *SEPARATORS, ".parquet")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # of data sets, beside their files
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` leaves
_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """One file, folder or Hub data set."""

    name: str
    kind: Literal["lines", "json", "csv", "parquet", "folder", "hub"]

    @property
    def place(self) -> str:
        """What two names of one file, folder or Hub data set have in common."""
        return f"hub:{self.name}" if self.kind == "hub" else os.path.realpath(self.name)

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
            "lines": read_lines,
            "json": read_json,
            "csv": read_csv,
            "parquet": read_parquet,
        }
        with reading(self.name):
            if self.kind in readers:
                yield from readers[self.kind](self.name)
            else:
                yield from _read_data_set(self)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Name the source that is being read in what goes wrong with it.

    Raises:
        DataError: In place of what readers raise where a whole source cannot be read.
    """
    try:
        yield
    except RecursionError:
        raise DataError(f"cannot read {name!r}: a row is nested too deep") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {name!r}: {error}") from error


def resolve(specs: Iterable[str]) -> list[Source]:
    """Return the sources that paths, globs, folders and Hub ids stand for, in order, each once.

    A folder is every data file in it and in its subfolders, sorted, or what `save_to_disk` wrote;
    `FOLDER:split` and `org/name[/config][:split]` name a split, `:all` takes all.

    Raises:
        DataError: If nothing is there, or a file's kind is unknown.
    """
    found: dict[str, Source] = {}
    for source in _resolve_all(specs):
        found.setdefault(source.place, source)
    return [*found.values()]


def log_contents(specs: Sequence[str]) -> None:
    """Say of each folder which files were taken and left, and what was named more than once."""
    for spec in specs:
        found = [spec] if Path(spec).exists() else glob.glob(spec, recursive=True)  # noqa: PTH207
        parts = {path: _inside(path) for path in sorted(found) if Path(path).is_dir()}
        folder, _, split = spec.rpartition(":")
        if not found and folder and (Path(folder) / _SAVED_SPLITS).is_file():
            parts[folder] = _saved_splits(folder, split)
        for name, (taken, left) in parts.items():
            logger.info("%s: taken: %s", name, _named([s.name for s in taken], name))
            if left:
                logger.warning("%s: left: %s", name, _named(left, name))
    names: dict[str, list[str]] = {}
    for source in _resolve_all(specs):
        names.setdefault(source.place, []).append(source.name)
    again = [" = ".join(same) for same in names.values() if len(same) > 1]
    if again:
        logger.warning("named more than once, and read once: %s", "; ".join(again))


def _resolve_all(specs: Iterable[str]) -> list[Source]:
    return [source for spec in specs for source in _resolve(spec)]


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
    if folder and Path(folder).is_dir():
        raise DataError(
            f"no such file: {spec!r}; the folder {folder!r} has no splits: `save_to_disk` wrote "
            "none there"
        )
    suffixes = Path(spec).suffixes
    if _HUB.fullmatch(spec) and not {*suffixes} & {*_KNOWN}:
        return [Source(spec, "hub")]
    raise DataError(f"no such file: {spec!r} (looked in {Path.cwd()})")


def _matches(pattern: str) -> list[str]:
    """Return what matches; a folder on the way that may not be read is no reason for silence."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):
        if glob.has_magic(part):  # what is in the folders before it is looked at
            before = parts[: number + 1] if part == "**" else parts[:number]
            for name in glob.glob(str(Path(*before)), recursive=True):  # noqa: PTH207
                if Path(name).is_dir():
                    _listed(name)
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 (absolute ones too)


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
        known = (_SAVED, _DESCRIPTIONS[0])
        left = [e.path for e in _listed(folder) if e.name not in known and e.name[-6:] != ".arrow"]
        return [Source(folder, "folder")], left
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
        elif _is_data(entry):
            taken.append(_file(entry.path))
        else:
            left.append(entry.path)
    return taken, left


def _is_data(entry: os.DirEntry[str]) -> bool:
    """Return whether a file of a folder is one of its data files; a pipe, say, is none."""
    hidden = entry.name.startswith(".") or entry.name in _DESCRIPTIONS
    return entry.is_file() and not hidden and _kind(entry.name) is not None


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
    left = [e.path for e in _listed(folder) if e.name not in (*chosen, _SAVED_SPLITS)]
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
    if suffix in SEPARATORS:
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


def _read_data_set(source: Source) -> Iterator[Row]:
    """Yield the rows of what `datasets` reads.

    Raises:
        DataError: If they cannot be read, for whatever reason.
    """
    try:
        values = chain.from_iterable(map(stored_values, _load(source)))
        yield from read_table(source.name, values)
    except DataError:
        raise
    except Exception as error:  # files of somebody else can be wrong in any way
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot read {source.name!r}: {reason}") from error


def _load(source: Source) -> list[Any]:
    """Return the splits of a source that are to be read."""
    import datasets

    if source.kind == "folder":
        return [datasets.load_from_disk(source.name)]
    match = _HUB.fullmatch(source.name)
    assert match is not None, "only such names are of the Hub"
    found: Any = datasets.load_dataset(match["id"], match["config"], streaming=True)
    name = "/".join(filter(None, match.group("id", "config")))
    chosen = _chosen(name, [*found], match["split"])
    logger.info("%s: split %s of %s", name, ", ".join(chosen), ", ".join(found))
    return [found[split] for split in chosen]

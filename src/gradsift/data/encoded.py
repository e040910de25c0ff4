"""A pool or target, encoded once and kept as Parquet: tokens, masks, raw bytes, where from.

Everything later reads this file, so picks can be written out byte for byte even when the sources
have moved, and a range of examples is read without touching the rest.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from gradsift.data.conversations import Message, rename, to_messages, to_tools
from gradsift.data.encoding import Encoded, Tools
from gradsift.data.groups import SCHEMA, GroupEncoder, ReadRow
from gradsift.data.schemas import describe_empty, describe_lacking, find_schema
from gradsift.data.sources import Source
from gradsift.errors import DataError
from gradsift.executors.base import Executor
from gradsift.executors.local import Local
from gradsift.progress import track
from gradsift.runs import layout

logger = logging.getLogger(__name__)

_GROUP = 1024  # rows encoded, written and read together


class EncodedSet:
    """The encoded examples of one pool or target; rows count from 0 in the order of the sources."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodedSet, (self.path,)

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        return pq.read_metadata(self.path)

    @cached_property
    def _starts(self) -> Int[np.ndarray, " group"]:
        """The first row of every group, and the end."""
        groups = range(self._metadata.num_row_groups)
        return np.cumsum([0, *(self._metadata.row_group(group).num_rows for group in groups)])

    def __len__(self) -> int:
        return self._metadata.num_rows

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Return whole columns, `row` among them if asked for."""
        stored = pq.read_table(self.path, columns=[c for c in columns if c != "row"])
        if "row" in columns:
            stored = stored.add_column(0, "row", pa.array(np.arange(len(self))))
        return stored.select(list(columns))

    def column(self, name: str) -> pa.Array:
        """Return a whole column, one dictionary for all names."""
        return self.table([name]).unify_dictionaries()[name].combine_chunks()

    def take(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return some columns of some rows, in the order asked for, reading only their groups."""
        wanted = np.asarray(rows, dtype=np.int64)
        unique, inverse = np.unique(wanted, return_inverse=True)
        owners = np.searchsorted(self._starts, unique, side="right") - 1
        parts = []
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
            for group in np.unique(owners):
                local = unique[owners == group] - self._starts[group]
                parts.append(file.read_row_group(int(group), columns=list(columns)).take(local))
            empty = file.schema_arrow.empty_table().select(list(columns))
        return pa.concat_tables(parts or [empty]).unify_dictionaries().take(inverse)

    def examples(self, rows: Sequence[int] | np.ndarray) -> list[Encoded]:
        """Return the tokens of some rows, in the order asked for."""
        if not len(rows):
            return []
        table = self.take(rows, ["input_ids", "supervised", "truncated"])
        lists = table["input_ids"].combine_chunks(), table["supervised"].combine_chunks()
        ends = (lists[0].offsets.to_numpy() - lists[0].offsets[0].as_py())[1:-1]
        ids, supervised = (
            np.split(column.flatten().to_numpy(zero_copy_only=False, writable=True), ends)
            for column in lists
        )
        truncated = table["truncated"].to_pylist()
        return [Encoded(*parts) for parts in zip(ids, supervised, truncated, strict=True)]

    def conversations(
        self, rows: Sequence[int] | np.ndarray, columns: Mapping[str, str]
    ) -> list[list[Message]]:
        """Return the conversations of some rows, understood as they were when they came in."""
        return [messages for messages, _ in self.conversations_with_tools(rows, columns)]

    def conversations_with_tools(
        self, rows: Sequence[int] | np.ndarray, columns: Mapping[str, str]
    ) -> Iterator[tuple[list[Message], Tools]]:
        """Yield the conversation of some rows and the tools that came with it."""
        table = self.take(rows, ["raw", "schema"])
        for raw, schema in zip(table["raw"].to_pylist(), table["schema"].to_pylist(), strict=True):
            fields = rename(json.loads(raw), columns)
            yield to_messages(fields, schema), to_tools(fields)


def encode_set(
    name: str,
    sources: Sequence[Source],
    encode: GroupEncoder,
    directory: Path,
    strict: bool = False,
    executor: Executor | None = None,
) -> EncodedSet:
    """Encode every row of the sources into `NAME.parquet`, the unusable into `NAME.rejected.jsonl`.

    `executor`: by which a large set is encoded in several processes, to the same bytes.

    Raises:
        DataError: If no row is usable, or the first unusable row under `strict`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = Path(layout.encoded(name, str(directory)))
    rejected = Path(layout.rejected(name, str(directory)))
    partial, reasons = path.with_name(f"{path.name}{layout.PARTIAL}"), Counter[str]()
    accepted = truncated = 0
    with (
        pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer,
        rejected.open("w", encoding="utf-8") as rejections,
        track(f"encoding {name}", None, "rows") as advance,
    ):
        groups = _in_groups(_read(sources, encode.columns))
        for group in (executor or Local()).stream(encode, groups):
            for file, line, reason in group.rejected:
                if strict:
                    raise DataError(f"{file}:{line}: {reason}")
                reasons[reason] += 1
                record = {"set": name, "file": file, "line": line, "reason": reason}
                rejections.write(json.dumps(record, ensure_ascii=False) + "\n")
            accepted += len(group.table)
            truncated += sum(group.table["truncated"].to_pylist())
            if len(group.table):
                writer.write_table(group.table)
            advance(len(group.table) + len(group.rejected))
    if not accepted:
        partial.unlink()
        raise DataError(_nothing_usable(name, sources, reasons, rejected))
    if reasons:
        logger.warning(
            "%s: %d of %d rows are unusable, for example: %s (all in %s)",
            name,
            reasons.total(),
            reasons.total() + accepted,
            reasons.most_common(1)[0][0],
            layout.REJECTED,
        )
    logger.info("%s: %d examples, %d of them truncated", name, accepted, truncated)
    partial.rename(path)
    return EncodedSet(path)


def _nothing_usable(
    name: str, sources: Sequence[Source], reasons: Counter[str], rejected: Path
) -> str:
    if not reasons:
        files = ", ".join(f"{source.name} ({describe_empty(source)})" for source in sources)
        return f"{name} is empty: no row in {files}; give files that have rows"
    files = ", ".join(source.name for source in sources)
    listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
    return f"{name} has no usable row in {files}: {listed} (all in {rejected})"


def _in_groups(rows: Iterator[ReadRow]) -> Iterator[list[ReadRow]]:
    while group := list(islice(rows, _GROUP)):
        yield group


def _read(sources: Sequence[Source], columns: Mapping[str, str]) -> Iterator[ReadRow]:
    """Yield each row; a file's schema is that of its first readable one."""
    for source in sources:
        schema = row = None
        stem = source.stem
        for row in source.rows():
            if schema is None and row.value is not None:
                schema = find_schema(row, columns)
                lacking = describe_lacking(row, columns)
                log = logger.warning if lacking else logger.info
                log("%s: %s%s", source.name, schema, lacking and f" ({lacking})")
            yield ReadRow(row, stem, schema)
        if row is None:
            logger.warning("%s has no row: %s", source.name, describe_empty(source))

"""Rows of any schema to encoded examples, a group at a time, in whatever process it is called."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gradsift.data.conversations import (
    Message,
    UnusableRowError,
    rename,
    text_of,
    to_messages,
    to_tools,
)
from gradsift.data.encoding import Encoded, Encoder, Tools
from gradsift.data.rows import Row

_NAME = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": _NAME,
        "task": _NAME,
        "file": _NAME,
        "line": pa.int64(),
        "schema": _NAME,
        "num_tokens": pa.int32(),
        "num_supervised": pa.int32(),
        "truncated": pa.bool_(),
        "text_hash": pa.binary(16),  # of the conversation, but for case and white space
        "prompt_hash": pa.binary(16),  # of all but the assistant turns; null where there are none
        "input_ids": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.bool_()),
        "raw": pa.large_binary(),  # picks may hold more than 2 GiB
    }
)


@dataclass(frozen=True)
class ReadRow:
    """A row as it was read, and what it takes from its file: a name for its source, a schema.

    Of a row that could not be read there is a problem in place of these.
    """

    row: Row
    source: str
    schema: str | None


@dataclass(frozen=True)
class Group:
    """What became of some rows: those that could be encoded, and file, line, reason of others."""

    table: pa.Table
    rejected: Sequence[tuple[str, int, str]]


@dataclass(frozen=True)
class GroupEncoder:
    """Encodes groups of rows, in whatever process; `load` makes the encoder there, once.

    `columns` maps fields to the rows' own. `key` tells one use from the next, for which the
    tokenizer may have changed.
    """

    load: Callable[[], Encoder]
    columns: Mapping[str, str]
    key: bytes = field(default_factory=lambda: os.urandom(8))

    def __call__(self, group: Sequence[ReadRow]) -> Group:
        """Return what became of each row."""
        candidates = [_understand(read, self.columns) for read in group]
        good = [item for item in candidates if isinstance(item, _Candidate)]
        conversations, tools = [c.messages for c in good], [c.tools for c in good]
        encoded = iter(_load_once(self.load, self.key).encode(conversations, tools))
        records, rejected = [], []
        for read, item in zip(group, candidates, strict=True):
            outcome = item if isinstance(item, UnusableRowError) else next(encoded)
            if isinstance(outcome, UnusableRowError):
                rejected.append((read.row.file, read.row.line, str(outcome)))
            else:
                assert isinstance(item, _Candidate)
                records.append(_record(item, outcome))
        return Group(pa.Table.from_pylist(records, schema=SCHEMA), rejected)


_loaded: dict[bytes, Encoder] = {}


def _load_once(load: Callable[[], Encoder], key: bytes) -> Encoder:
    """Return the encoder of a key, loaded if it is not the one that was asked for last."""
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load()
    return _loaded[key]


@dataclass(frozen=True)
class _Candidate:
    """A row with its conversation, not yet encoded."""

    read: ReadRow
    fields: Mapping[str, Any]
    messages: list[Message]
    tools: Tools


def _understand(read: ReadRow, columns: Mapping[str, str]) -> _Candidate | UnusableRowError:
    """Return the conversation of a row, or why it has none."""
    if read.row.value is None or read.schema is None:
        return UnusableRowError(read.row.problem or "")
    fields = rename(read.row.value, columns)
    try:
        return _Candidate(read, fields, to_messages(fields, read.schema), to_tools(fields))
    except UnusableRowError as reason:
        return reason


def _record(candidate: _Candidate, encoded: Encoded) -> dict[str, Any]:
    fields, row, source = candidate.fields, candidate.read.row, candidate.read.source
    turns = [(m["role"], normalise(text_of(m))) for m in candidate.messages]
    prompt = [turn for turn in turns if turn[0] != "assistant"]
    return {
        "id": _name(fields.get("id"), f"{source}-{row.line}"),
        "source": _name(fields.get("source"), source),
        "task": _name(fields.get("task"), ""),
        "file": row.file,
        "line": row.line,
        "schema": candidate.read.schema,
        "num_tokens": len(encoded.input_ids),
        "num_supervised": int(encoded.supervised.sum()),
        "truncated": encoded.truncated,
        "text_hash": _hash(turns, candidate.tools),
        "prompt_hash": _hash(prompt) if any(text for _, text in prompt) else None,
        "input_ids": encoded.input_ids,
        "supervised": encoded.supervised,
        "raw": row.raw,
    }


def _name(value: Any, default: str) -> str:
    return default if value is None or value == "" else str(value)


def _hash(turns: Sequence[tuple[str, str]], tools: Tools = None) -> bytes:
    """Return a hash of the roles and normalised texts of some turns, and of their tools."""
    text = "\0".join(f"{role}\1{said}" for role, said in turns)
    if tools:
        text += "\2" + json.dumps(tools, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def normalise(text: str) -> str:
    """Return the text folded to what makes two examples the same: no case, single spaces.

    >>> normalise("Two   APPLES ")
    'two apples'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

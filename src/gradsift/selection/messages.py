"""The picks in one schema, whatever schemas the pool has: what every trainer reads.

A line is `{"id": …, "source": …, "score": …, "messages": [{"role": …, "content": …}, …]}`, with
`weight` after `score` where picks have weights; where some pick has tools, every line has `tools`,
a list written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from gradsift.data.conversations import Message
from gradsift.data.encoded import EncodedSet

_ROWS_AT_ONCE = 8192
_KEPT = ("id", "source", "score", "weight")
_OTHER_KEYS = (  # of a turn, beside role and content: what chat templates know
    "name", "tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning",
    "thinking",
)  # fmt: skip


def write_messages(
    pool: EncodedSet, columns: Mapping[str, str], picks: pa.Table, path: Path
) -> None:
    """Write the picks (`row`, `id`, `source`, `score`, `weight` if there) as conversations.

    A line each, in order.

    `columns` maps fields to the pool's own columns. `datasets` infers its types from the first
    10 MB of a file, and cannot read a turn whose keys come up later, unless turns already differ
    in their keys there: so the first turn has, as nulls, all keys that some turn has.
    """
    known: set[str] = set()
    for line in _lines(pool, columns, picks):
        known.update(key for turn in line["messages"] for key in turn)
        known.update(line.keys() & {"tools"})
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(_lines(pool, columns, picks)):
            if number == 0:
                line["messages"][0] |= {
                    key: None for key in _OTHER_KEYS if key in known - {*line["messages"][0]}
                }
            if "tools" in known:
                line.setdefault("tools", "[]")
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines(
    pool: EncodedSet, columns: Mapping[str, str], picks: pa.Table
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(picks), _ROWS_AT_ONCE):
        part = picks.slice(start, _ROWS_AT_ONCE)
        kept = [name for name in _KEPT if name in picks.column_names]
        rows, facts = part["row"].to_numpy(), part.select(kept).to_pylist()
        found = pool.conversations_with_tools(rows, columns)
        for fact, (messages, tools) in zip(facts, found, strict=True):
            line = fact | {"messages": [_turn(message) for message in messages]}
            yield line | ({"tools": json.dumps(tools, ensure_ascii=False)} if tools else {})


def _turn(message: Message) -> dict[str, Any]:
    """Return a turn whose content is one text: the parts of one that came in parts, joined."""
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content or [])
    others = {key: message[key] for key in _OTHER_KEYS if key in message}
    return {"role": message["role"], "content": content} | others

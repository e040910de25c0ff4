"""What a selection shows of itself at a prompt and in a notebook."""

from __future__ import annotations

import json
from collections import Counter
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from gradsift.data.conversations import as_text

_PICKS, _SOURCES, _CHARACTERS = 5, 8, 160
_BAR = "display:inline-block;height:.7em;background:#3b6ea8;width:{:.0f}px"


def in_words(title: str, picks: pa.Table, path: Path) -> str:
    """Return three lines: a title, where the picks are from and the best of them, their file."""
    counted, first = _sources(picks), picks.slice(0, 1).to_pylist()
    sources = ", ".join(f"{name} {number:,}" for name, number in counted[:3])
    best = f"; best: {first[0]['id']} ({first[0]['score']:.4f})" if first else ""
    return f"{title}\n  from {sources}{' and others' * (len(counted) > 3)}{best}\n  {path}"


def as_html(title: str, picks: pa.Table, messages: Path) -> str:
    """Return a title, the sources as bars, and the first picks; `messages`: the picks' texts."""
    counted = _sources(picks)
    widest = max((number for _, number in counted), default=1)
    bars = [
        [escape(name), f'<span style="{_BAR.format(200 * number / widest)}"></span> {number:,}']
        for name, number in counted[:_SOURCES]
    ]
    if others := sum(number for _, number in counted[_SOURCES:]):
        bars.append([f"{len(counted) - _SOURCES} others", f"{others:,}"])
    shown = [
        [
            str(fact["rank"]),
            f"{fact['score']:.4f}",
            escape(fact["source"]),
            escape(fact["id"]),
            text,
        ]
        for fact, text in zip(picks.slice(0, _PICKS).to_pylist(), _begin(messages), strict=True)
    ]
    return (
        f"<div><b>{escape(title)}</b>{_table(['source', 'picks'], bars)}"
        f"{_table(['rank', 'score', 'source', 'id', 'example'], shown)}</div>"
    )


def _sources(picks: pa.Table) -> list[tuple[str, int]]:
    return Counter(picks["source"].to_pylist()).most_common()


def _begin(messages: Path) -> list[str]:
    """Return how the first picks begin."""
    with messages.open(encoding="utf-8") as file:
        found: list[dict[str, Any]] = [json.loads(line) for line in islice(file, _PICKS)]
    texts = [as_text(line["messages"], _CHARACTERS) for line in found]
    return [escape(text).replace("\n", "<br>") for text in texts]


def _table(head: list[str], rows: list[list[str]]) -> str:
    cell = '<td style="text-align:left;vertical-align:top">{}</td>'
    titles = "".join(f'<th style="text-align:left">{title}</th>' for title in head)
    body = "".join(f"<tr>{''.join(map(cell.format, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"

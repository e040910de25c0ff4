"""The examples that the page shows, as plain values: picks, what was nearly picked, the lowest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.data.conversations import text_of
from gradsift.data.encoded import EncodedSet
from gradsift.methods.job import Job
from gradsift.selection.picks import Selection
from gradsift.selection.score_table import describe_rows

Turns = list[tuple[str, str]]
"""A conversation, as long as the page shows it: the role and the text of each turn."""

_CHARACTERS = 500  # of each turn
_BYTES = 1100  # of all turns together, as they stand in the page: it stays under 12 MB
_PICKS, _BEST_LEFT, _REFUSED, _LOWEST = 300, 100, 50, 50
_ROWS_IN_ALL = 2000  # of all pages together


@dataclass(frozen=True)
class Card:
    """One example of the pool; `best` names the target example that won it."""

    status: str
    place: int
    score: float
    share: float | None
    source: str
    num_tokens: int
    id: str
    turns: Turns
    best: str | None


def cards(
    job: Job, name: str, selection: Selection, scores: Float[np.ndarray, " example"]
) -> list[Card]:
    """Return picks, the best that were left, refused ones and the lowest, in that order."""
    share = min(1.0, _ROWS_IN_ALL / len(job.targets) / (_PICKS + _BEST_LEFT + _REFUSED + _LOWEST))
    order = np.argsort(-scores, kind="stable")
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(1, len(order) + 1)
    picked, refused = (t["row"].to_numpy() for t in (selection.picks, selection.refused))
    left = order[~np.isin(order, np.concatenate([picked, refused]))]
    reasons = dict(zip(refused.tolist(), selection.refused["reason"].to_pylist(), strict=True))
    best, lowest = left[: int(_BEST_LEFT * share)], left[int(_BEST_LEFT * share) :]
    chosen: dict[int, str] = {}
    for status, rows in (
        ("picked", _evenly(picked, int(_PICKS * share))),
        ("best not picked", best),
        ("", refused[: int(_REFUSED * share)]),
        ("lowest", lowest[max(0, len(lowest) - int(_LOWEST * share)) :]),
    ):
        chosen |= {row: status or f"refused: {reasons[row]}" for row in rows.tolist()}
    found = conversations(job, job.pool, [*chosen])
    facts = describe_rows(job.folder.path, job.config.method, name, [*chosen])
    return [
        Card(status=status, place=int(places[row]), score=float(scores[row]), turns=turns, **fact)
        for (row, status), turns, fact in zip(chosen.items(), found, facts, strict=True)
    ]


def _evenly(rows: Int[np.ndarray, " row"], count: int) -> Int[np.ndarray, " shown"]:
    """Return `count` of the rows, spread evenly, the first and the last among them."""
    return rows[np.unique(np.linspace(0, max(0, len(rows) - 1), min(count, len(rows))).astype(int))]


def winners(job: Job, name: str, ids: set[str]) -> dict[str, Turns]:
    """Return some target examples by id; of equal ids, the first."""
    target = job.targets[name]
    every = target.column("id").to_pylist()
    rows = [every.index(id_) for id_ in sorted(ids)]
    return dict(zip((every[row] for row in rows), conversations(job, target, rows), strict=True))


def conversations(
    job: Job, encoded: EncodedSet, rows: Sequence[int] | Int[np.ndarray, " row"]
) -> list[Turns]:
    """Return the conversations of some rows, as long as the page shows them."""
    return [
        _cut([(message["role"], text_of(message)) for message in messages])
        for messages in encoded.conversations(rows, job.config.data.columns)
    ]


def _cut(turns: Turns) -> Turns:
    """Return the first turns, each cut, that together fit into what the page holds of an example.

    >>> _cut([("user", "How are you?"), ("assistant", "x" * 600)])[1][1][-4:]
    'xx …'
    """
    shown, left = [], _BYTES
    for number, (role, text) in enumerate(turns):
        kept = text[:_CHARACTERS]
        while kept and _size(kept) > left:
            kept = kept[: len(kept) * left // _size(kept)]
        shown.append((role, kept if len(kept) == len(text) else f"{kept} …"))
        left -= _size(kept) + 30  # its role and what encloses it
        if left <= 0 and number + 1 < len(turns):
            return [*shown, ("", f"{len(turns) - number - 1} more turns")]
    return shown


def _size(text: str) -> int:
    """Return the bytes of a text in the page: three of its characters are written as six."""
    written = json.dumps(text, ensure_ascii=False).encode()
    return len(written) + 5 * sum(map(text.count, "<>&"))

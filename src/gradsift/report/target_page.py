"""What the report says of one target, gathered from a run as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gradsift.data.conversations import as_text
from gradsift.data.encoded import EncodedSet
from gradsift.methods.job import Job
from gradsift.report.exhibits import Exhibit, read_exhibits
from gradsift.runs import layout
from gradsift.scores.ranking import Scores
from gradsift.selection.directions import leading_directions, read_spectra
from gradsift.selection.picks import Selection, read_selection
from gradsift.selection.policies import Candidates
from gradsift.selection.score_table import describe_rows, read_scores
from gradsift.selection.source_shares import SourceShare, source_shares
from gradsift.selection.stability import (
    Change,
    Noise,
    can_compare_twice_the_rank,
    changes,
    compare_with_twice_the_rank,
    noise_at_cut,
)
from gradsift.selection.stages import RunStages

_CHARACTERS, _TEXT = 500, 800  # of each turn shown, and of all turns together
_PICKS, _BEST_LEFT, _REFUSED, _LOWEST = 300, 100, 50, 50  # rows of the table
_ROWS_IN_ALL = 2000  # of the tables of all targets
_BINS = 60


@dataclass(frozen=True)
class Line:
    """One example in the table of the report; `best` names the target example that won it."""

    status: str
    place: int
    score: float
    share: float | None
    source: str
    num_tokens: int
    id: str
    text: str
    best: str | None


@dataclass(frozen=True)
class DirectionExamples:
    """A leading direction: its share of the variance, and who loads on it most, on both sides."""

    number: int
    variance: float
    positive: Sequence[tuple[float, str, str]]
    negative: Sequence[tuple[float, str, str]]


@dataclass(frozen=True)
class Histogram:
    """Shares of the rows in each bin, of the pool and of the picks."""

    edges: Float[np.ndarray, " edge"]
    pool: Float[np.ndarray, " bin"]
    picks: Float[np.ndarray, " bin"]


@dataclass(frozen=True)
class TargetPage:
    """Everything that is said of one target."""

    name: str
    selection: Selection
    sources: Sequence[SourceShare]
    lengths: Histogram
    scores: Histogram
    cut: float | None
    noise: Noise | None
    changes: Sequence[Change]
    refusals: Mapping[str, int]
    repeats_looked_for: bool
    lines: Sequence[Line]
    winners: Mapping[str, str]
    spectra: Mapping[str, Any]
    directions: Sequence[DirectionExamples]
    exhibits: Sequence[Exhibit]


def target_page(
    job: Job, stages: RunStages, name: str, pool: Candidates, aligned: Scores
) -> TargetPage:
    """Return everything that is said of one target."""
    path, method = job.folder.path, job.config.method
    selection = read_selection(path, name)
    rows, refused = (t["row"].to_numpy() for t in (selection.picks, selection.refused))
    scores, num_tokens = read_scores(path, method, name), pool.num_tokens
    is_gist, finite = method == "gist", np.isfinite(scores)
    found: list[Change] = []
    if is_gist:
        reasons = selection.refused["reason"].to_pylist()
        repeated = refused[[reason.startswith("repeats") for reason in reasons]]
        found += changes(job, name, rows, repeated, pool)
        if can_compare_twice_the_rank(job, name):
            found.append(compare_with_twice_the_rank(job, name, rows, repeated, pool))
    policy, noise = job.config.policy, None
    cut = float(scores[rows].min()) if policy.strategy == "top" and not policy.source_cap else None
    if cut is not None:
        noise = noise_at_cut(aligned, scores, cut)
    bins = np.histogram_bin_edges(scores[finite].astype(np.float64), _BINS)
    lines = _lines(job, name, selection, scores)
    edges = np.geomspace(max(1, num_tokens.min()), num_tokens.max() + 1, _BINS // 2)
    return TargetPage(
        name=name,
        selection=selection,
        sources=source_shares(pool.sources, selection.picks["source"]),
        lengths=_histogram(num_tokens, rows, edges),
        scores=_histogram(scores, rows, bins),
        cut=cut,
        repeats_looked_for=(policy.duplicates, policy.decontaminate) != ("keep", "none"),
        noise=noise,
        changes=found,
        refusals=Counter(selection.refused["reason"].to_pylist()),
        lines=lines,
        winners=_winners(job, name, {line.best for line in lines if line.best is not None}),
        spectra=read_spectra(path, name) if is_gist else {},
        directions=_directions(job, name) if is_gist else (),
        exhibits=[
            *read_exhibits(
                job.folder, layout.EVALUATION, name, stages.selections[name].fingerprint
            ),
            *read_exhibits(job.folder, layout.GEOMETRY, name, job.inputs.gradients_key(name)),
        ],
    )


def _histogram(
    values: Float[np.ndarray, " example"] | Int[np.ndarray, " example"],
    rows: Int[np.ndarray, " row"],
    edges: Float[np.ndarray, " edge"],
) -> Histogram:
    shares = []
    for own in (values, values[rows]):
        counts = np.histogram(own[np.isfinite(own)], edges)[0]
        shares.append(counts / max(1, counts.sum()))
    return Histogram(np.asarray(edges, np.float64), *shares)


def _lines(
    job: Job, name: str, selection: Selection, scores: Float[np.ndarray, " example"]
) -> list[Line]:
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
    texts = _texts(job, job.pool, [*chosen])
    facts = describe_rows(job.folder.path, job.config.method, name, [*chosen])
    return [
        Line(
            status=status,
            place=int(places[row]),
            score=float(scores[row]),
            text=text,
            **fact,
        )
        for (row, status), text, fact in zip(chosen.items(), texts, facts, strict=True)
    ]


def _evenly(rows: Int[np.ndarray, " row"], count: int) -> Int[np.ndarray, " shown"]:
    """Return `count` of the rows, spread evenly, the first among them."""
    return rows[np.unique(np.linspace(0, max(0, len(rows) - 1), min(count, len(rows))).astype(int))]


def _winners(job: Job, name: str, ids: set[str]) -> dict[str, str]:
    """Return the texts of some target examples by id; of equal ids, the first."""
    target = job.targets[name]
    every = target.column("id").to_pylist()
    rows = [every.index(id_) for id_ in sorted(ids)]
    return dict(zip((every[row] for row in rows), _texts(job, target, rows), strict=True))


def _texts(
    job: Job, encoded: EncodedSet, rows: Sequence[int] | Int[np.ndarray, " row"]
) -> list[str]:
    """Return the conversations of some rows, as long as the page shows them."""
    found = encoded.conversations(rows, job.config.data.columns)
    return [as_text(messages, _CHARACTERS)[:_TEXT] for messages in found]


def _directions(job: Job, name: str) -> list[DirectionExamples]:
    """Return who loads most on the first directions at the last checkpoint."""
    return [
        DirectionExamples(
            found.number,
            found.variance,
            _shown(job, found.loadings, found.positive),
            _shown(job, found.loadings, found.negative),
        )
        for found in leading_directions(job, name)
    ]


def _shown(
    job: Job, loadings: Float[np.ndarray, " example"], rows: Int[np.ndarray, " row"]
) -> list[tuple[float, str, str]]:
    """Return loading, id and text of some pool examples."""
    ids = job.pool.take(rows, ["id"])["id"].to_pylist()
    return [*zip(loadings[rows].tolist(), ids, _texts(job, job.pool, rows), strict=True)]

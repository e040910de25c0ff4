"""What the report says of the picks for one target, gathered from a run as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from gradsift.config import PolicyConfig
from gradsift.methods.job import Job
from gradsift.report.cards import Card, Turns, cards, conversations, winners
from gradsift.report.exhibits import Exhibit, read_exhibits
from gradsift.runs import layout
from gradsift.scores.ranking import Scores
from gradsift.selection.directions import leading_directions, read_spectra
from gradsift.selection.picks import Selection, read_selection
from gradsift.selection.policies import Candidates
from gradsift.selection.score_table import read_scores
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

_BINS = 60


@dataclass(frozen=True)
class DirectionExamples:
    """A leading direction: its share of the variance, and who loads on it most, on both sides.

    Of each example its loading, its id and its conversation.
    """

    number: int
    variance: float
    positive: Sequence[tuple[float, str, Turns]]
    negative: Sequence[tuple[float, str, Turns]]


@dataclass(frozen=True)
class Histogram:
    """Shares of the rows in each bin, of the pool and of the picks, and the median of each."""

    edges: Float[np.ndarray, " edge"]
    pool: Float[np.ndarray, " bin"]
    picks: Float[np.ndarray, " bin"]
    medians: tuple[float, float]


@dataclass(frozen=True)
class Edge:
    """How sure the choice is at the lowest score picked.

    `num_sure`: picks whose score is higher than the cut by more than the noise. `at_twice`: the
    noise at the cut of twice as many picks, none where the pool does not hold them.
    """

    cut: float
    noise: Noise | None
    num_sure: int
    at_twice: Noise | None


@dataclass(frozen=True)
class TargetPage:
    """Everything that is said of the picks for one target; `key` is its place in the address.

    `others`: what the folder keeps beside them under other names.
    """

    key: str
    name: str
    method: str
    num_pool: int
    num_target: int
    policy: PolicyConfig
    selection: Selection
    others: Sequence[Selection]
    sources: Sequence[SourceShare]
    lengths: Histogram
    scores: Histogram
    edge: Edge | None
    changes: Sequence[Change]
    refusals: Mapping[str, int]
    cards: Sequence[Card]
    winners: Mapping[str, Turns]
    spectra: Mapping[str, Any]
    directions: Sequence[DirectionExamples]
    evaluation: Sequence[Exhibit]
    geometry: Sequence[Exhibit]


def target_page(
    job: Job,
    stages: RunStages,
    name: str,
    pool: Candidates,
    aligned: Scores,
    kept: Sequence[Selection],
) -> TargetPage:
    """Return everything that is said of the picks for one target.

    `kept`: all selections of the target that the folder has.
    """
    path, method, policy = job.folder.path, job.config.method, job.config.policy
    key = policy.selection_of(name)
    selection = read_selection(path, key)
    others = [other for other in kept if other.key != key]
    rows = selection.picks["row"].to_numpy()
    scores, num_tokens = read_scores(path, method, name), pool.num_tokens
    is_gist, finite = method == "gist", np.isfinite(scores)
    plain = policy.strategy == "top" and not policy.source_cap
    edges = np.geomspace(max(1, num_tokens.min()), num_tokens.max() + 1, _BINS // 2)
    shown = cards(job, name, selection, scores)
    fingerprint, gradients = stages.selections[name].fingerprint, job.inputs.gradients_key(name)
    return TargetPage(
        key=key,
        name=name,
        method=method,
        num_pool=len(scores),
        num_target=len(job.targets[name]),
        policy=policy,
        selection=selection,
        others=others,
        sources=_all_sources(pool.sources, selection.picks["source"]),
        lengths=_histogram(num_tokens, rows, edges),
        scores=_histogram(
            scores, rows, np.histogram_bin_edges(scores[finite].astype(np.float64), _BINS)
        ),
        edge=_edge(aligned, scores, rows) if plain else None,
        changes=_changes(job, name, selection, pool) if is_gist else (),
        refusals=Counter(selection.refused["reason"].to_pylist()),
        cards=shown,
        winners=winners(job, name, {card.best for card in shown if card.best is not None}),
        spectra=read_spectra(path, name) if is_gist else {},
        directions=_directions(job, name) if is_gist else (),
        evaluation=read_exhibits(job.folder, layout.EVALUATION, name, fingerprint),
        geometry=read_exhibits(job.folder, layout.GEOMETRY, name, gradients),
    )


def _all_sources(
    pool: pa.Array | pa.ChunkedArray, picks: pa.Array | pa.ChunkedArray
) -> list[SourceShare]:
    """Return where picks come from, the largest source first, then the sources without any."""
    found = source_shares(pool, picks)
    names = {share.source for share in found}
    return found + [
        SourceShare(share.source, 0, 0.0, share.of_pool)
        for share in source_shares(pool, pool)
        if share.source not in names
    ]


def _histogram(
    values: Float[np.ndarray, " example"] | Int[np.ndarray, " example"],
    rows: Int[np.ndarray, " row"],
    edges: Float[np.ndarray, " edge"],
) -> Histogram:
    shares, medians = [], []
    for own in (values, values[rows]):
        finite = own[np.isfinite(own)]
        counts = np.histogram(finite, edges)[0]
        shares.append(counts / max(1, counts.sum()))
        medians.append(float(np.median(finite)) if len(finite) else 0.0)
    return Histogram(np.asarray(edges, np.float64), shares[0], shares[1], (medians[0], medians[1]))


def _edge(
    aligned: Scores, scores: Float[np.ndarray, " example"], rows: Int[np.ndarray, " row"]
) -> Edge:
    """Return how sure the choice is where it ends, and where one of twice as many would."""
    cut = float(scores[rows].min())
    noise, at_twice = noise_at_cut(aligned, scores, cut), None
    if noise and 2 * len(rows) < len(scores):
        cut_at_twice = np.partition(scores, len(scores) - 2 * len(rows))[
            len(scores) - 2 * len(rows)
        ]
        if np.isfinite(cut_at_twice):
            at_twice = noise_at_cut(aligned, scores, float(cut_at_twice))
    sure = int((scores[rows] > cut + noise.width).sum()) if noise else 0
    return Edge(cut, noise, sure, at_twice)


def _changes(job: Job, name: str, selection: Selection, pool: Candidates) -> list[Change]:
    """Return what other settings would have picked."""
    rows, refused = (t["row"].to_numpy() for t in (selection.picks, selection.refused))
    reasons = selection.refused["reason"].to_pylist()
    repeated = refused[[reason.startswith("repeats") for reason in reasons]]
    found = changes(job, name, rows, repeated, pool)
    if can_compare_twice_the_rank(job, name):
        found.append(compare_with_twice_the_rank(job, name, rows, repeated, pool))
    return found


def _directions(job: Job, name: str) -> list[DirectionExamples]:
    """Return who loads most on the first directions at the last checkpoint."""
    return [
        DirectionExamples(
            found.number,
            found.variance,
            _loading_most(job, found.loadings, found.positive),
            _loading_most(job, found.loadings, found.negative),
        )
        for found in leading_directions(job, name)
    ]


def _loading_most(
    job: Job, loadings: Float[np.ndarray, " example"], rows: Int[np.ndarray, " row"]
) -> list[tuple[float, str, Turns]]:
    """Return loading, id and conversation of some pool examples."""
    ids = job.pool.take(rows, ["id"])["id"].to_pylist()
    return [*zip(loadings[rows].tolist(), ids, conversations(job, job.pool, rows), strict=True)]

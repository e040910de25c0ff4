"""From scores to picks in the run folder: what a policy picks for a target, and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from gradsift.data.duplicates import dedup_columns
from gradsift.data.encoded import EncodedSet
from gradsift.methods.job import Job
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.scores.ranking import Scores
from gradsift.selection.policies import Candidates, Picks, pick
from gradsift.selection.score_table import projected_shares, read_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """The picks for one target.

    `picks` has a row per pick: `rank`, `row`, `id`, `source`, `num_tokens`, `score`,
    `projected_share`, `best` (id of the target example that won), `task` (of that example); the
    last three are null where the method knows no such thing.
    `refused` has a row per example that was passed over: `row`, `id`, `source`, `reason`, `like`.
    """

    target: str
    path: Path
    picks: pa.Table = field(repr=False)
    refused: pa.Table = field(repr=False)
    shortfall: str | None = None


def candidates(pool: EncodedSet, columns: Mapping[str, str]) -> Candidates:
    """Return the pool as a policy sees it; `columns` maps fields to the pool's own columns."""
    return Candidates(
        dedup_columns(pool, columns), pool.column("source"), pool.column("num_tokens").to_numpy()
    )


def write_selection(job: Job, name: str, scores: Scores) -> None:
    """Write the picks of one target: their own bytes, and why each was picked or passed over."""
    policy, target, columns = job.config.policy, job.targets[name], job.config.data.columns
    if policy.strategy == "top":
        rankings = read_scores(job.folder.path, job.config.method, name)[:, None]
    else:
        rankings = scores.rankings(policy)
    picks = pick(rankings, candidates(job.pool, columns), dedup_columns(target, columns), policy)
    _log(name, picks)
    rows, own = np.array(picks.rows, np.int64), np.array(picks.rankings, np.int64)
    winners = scores.winners(policy, rows, own)
    reasons = _describe(job.pool, rows)
    reasons = reasons.add_column(0, "rank", pa.array(np.arange(1, len(rows) + 1)))
    reasons = reasons.append_column("score", pa.array(rankings[rows, own]))
    shares = projected_shares(job.folder.path, job.config.method, name, rows)
    reasons = reasons.append_column("projected_share", shares)
    reasons = _append_winners(reasons, target, winners)
    reasons = reasons.replace_schema_metadata({"shortfall": picks.shortfall or ""})
    job.path(layout.SELECTED).mkdir(exist_ok=True)
    write_lines = partial(_write_lines, job.pool.take(rows, ["raw"]))
    write_atomically(job.path(layout.picks(name)), write_lines)
    write_atomically(job.path(layout.reasons(name)), partial(pq.write_table, reasons))
    refusals = _refusals(job.pool, picks)
    write_atomically(job.path(layout.refusals(name)), partial(pq.write_table, refusals))


def read_selection(run: Path, name: str) -> Selection:
    """Return the stored picks for one target."""
    picks = pq.read_table(run / layout.reasons(name))
    refused = pq.read_table(run / layout.refusals(name))
    shortfall = (picks.schema.metadata or {}).get(b"shortfall", b"").decode()
    return Selection(name, run / layout.picks(name), picks, refused, shortfall or None)


def _log(name: str, picks: Picks) -> None:
    if picks.shortfall:
        logger.warning("%s: %s", name, picks.shortfall)
    counts = Counter(refusal.reason for refusal in picks.refused)
    refused = ", ".join(f"{count} refused: {reason}" for reason, count in counts.most_common())
    logger.info("%s: %d picks, %s", name, len(picks.rows), refused or "none refused")


def _describe(pool: EncodedSet, rows: Int[np.ndarray, " row"]) -> pa.Table:
    table = pool.take(rows, ["id", "source", "num_tokens"])
    return table.add_column(0, "row", pa.array(rows))


def _append_winners(
    reasons: pa.Table, target: EncodedSet, winners: Int[np.ndarray, " row"] | None
) -> pa.Table:
    """Return the table with the target example that won each pick, where examples count."""
    for column, of_target in {"best": "id", "task": "task"}.items():
        values = pa.nulls(len(reasons), pa.string())
        if winners is not None:
            values = target.column(of_target).take(pa.array(winners))
        reasons = reasons.append_column(column, values)
    return reasons


def _refusals(pool: EncodedSet, picks: Picks) -> pa.Table:
    table = _describe(pool, np.array([refusal.row for refusal in picks.refused], np.int64))
    for column in ("reason", "like"):
        values = pa.array([getattr(refusal, column) for refusal in picks.refused], pa.string())
        table = table.append_column(column, values)
    return table


def _write_lines(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        for line in table["raw"]:
            file.write(line.as_py() + b"\n")

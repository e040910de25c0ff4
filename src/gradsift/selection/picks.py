"""From scores to picks in the run folder: what a policy chooses for a target, and why."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from gradsift.config import PolicyConfig
from gradsift.data.duplicates import texts_of
from gradsift.data.encoded import EncodedSet
from gradsift.methods.job import Job
from gradsift.runs.atomic import write_atomically
from gradsift.scores.ranking import Scores
from gradsift.selection.policies import Candidates, Picks, pick
from gradsift.selection.score_table import projected_shares, read_scores

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


def candidates(job: Job) -> Candidates:
    """Return the pool as a policy sees it."""
    return Candidates(
        texts_of(job.pool, job.config.data.columns),
        job.pool.column("source"),
        job.pool.column("num_tokens").to_numpy(),
    )


def choose(
    job: Job,
    name: str,
    turns: Float[np.ndarray, "example turn"],
    policy: PolicyConfig,
    pool: Candidates | None = None,
) -> Picks:
    """Return what a policy picks for a target from the scores of those whose turn it can be.

    `pool` is what `candidates` gives, for callers that choose more than once.
    """
    target = texts_of(job.targets[name], job.config.data.columns)
    return pick(turns, pool or candidates(job), target, policy)


def write_selection(job: Job, name: str, scores: Scores) -> None:
    """Write the picks of one target: their own bytes, and why each was picked or passed over."""
    policy, target = job.config.policy, job.targets[name]
    if policy.strategy == "top":
        turns = read_scores(job.folder.path, job.config.method, name)[:, None]
    else:
        turns = scores.turns(policy)
    picks = choose(job, name, turns, policy)
    if picks.shortfall:
        logger.warning("%s: %s", name, picks.shortfall)
    reasons = Counter(refusal.reason for refusal in picks.refused)
    told = ", ".join(f"{count} refused: {reason}" for reason, count in reasons.most_common())
    logger.info("%s: %d picks, %s", name, len(picks.rows), told or "none refused")
    rows, own = np.array(picks.rows, np.int64), np.array(picks.turns, np.int64)
    why = _described(job.pool, rows).add_column(0, "rank", pa.array(np.arange(1, len(rows) + 1)))
    why = why.append_column("score", pa.array(turns[rows, own]))
    why = why.append_column("projected_share", projected_shares(job, name, rows))
    winners = scores.winners(policy, rows, own)
    for column, of_target in {"best": "id", "task": "task"}.items():
        values = pa.nulls(len(rows), pa.string())
        if winners is not None:
            values = target.column(of_target).take(pa.array(winners))
        why = why.append_column(column, values)
    why = why.replace_schema_metadata({"shortfall": picks.shortfall or ""})
    refused = _described(job.pool, np.array([r.row for r in picks.refused], np.int64))
    for column in ("reason", "like"):
        values = pa.array([getattr(r, column) for r in picks.refused], pa.string())
        refused = refused.append_column(column, values)
    path = job.path("selected")
    path.mkdir(exist_ok=True)
    write_atomically(path / f"{name}.jsonl", partial(_write_lines, job.pool.take(rows, ["raw"])))
    write_atomically(path / f"{name}.parquet", partial(pq.write_table, why))
    write_atomically(path / f"{name}.refused.parquet", partial(pq.write_table, refused))


def _write_lines(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        for line in table["raw"]:
            file.write(line.as_py() + b"\n")


def read_selection(run: Path, name: str) -> Selection:
    """Return the stored picks for one target."""
    path = run / "selected" / f"{name}.jsonl"
    picks = pq.read_table(path.with_name(f"{name}.parquet"))
    refused = pq.read_table(path.with_name(f"{name}.refused.parquet"))
    shortfall = (picks.schema.metadata or {}).get(b"shortfall", b"").decode()
    return Selection(name, path, picks, refused, shortfall or None)


def _described(pool: EncodedSet, rows: np.ndarray) -> pa.Table:
    table = pool.take(rows, ["id", "source", "num_tokens"])
    return table.add_column(0, "row", pa.array(rows))


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

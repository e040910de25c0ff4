"""From scores to picks in the run folder: what a policy picks for a target, and why."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from gradsift.data.duplicates import dedup_columns
from gradsift.data.encoded import EncodedSet
from gradsift.errors import RunError, translate_os_errors
from gradsift.methods.job import Job
from gradsift.policy_config import PolicyConfig, WeightKind
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.folder import Run
from gradsift.runs.opening import local_folder, read_config
from gradsift.scores.ranking import Scores
from gradsift.selection.card import card, describe_card
from gradsift.selection.messages import write_messages
from gradsift.selection.notebook import as_html, in_words
from gradsift.selection.policies import Candidates, Picks, pick, shorten_policy
from gradsift.selection.score_table import projected_shares, read_scores
from gradsift.selection.weights import pick_weights

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FILES_VERSION = 3  # of the files of a selection
_REASONS = layout.reasons("").removeprefix(layout.selection(""))  # how the names of these files end


@dataclass(frozen=True, repr=False)
class Selection:
    """The picks for one target, and what they were picked by.

    `picks` has a row per pick: `rank`, `row`, `id`, `source`, `num_tokens`, `score`, `weight` (if
    its policy gives any), `projected_share`, `best` (id of the target example that won), `task` (of
    that example); the last three are null where the method knows no such thing.
    `refused` has a row per example that was passed over: `row`, `id`, `source`, `reason`, `like`.
    `path` has the picks byte for byte; `messages_path` has them as messages, for any trainer.

    Examples:
        >>> own = gradsift.open_run("runs/gsm8k").selections["gsm8k"]        # doctest: +SKIP
        >>> own.dataset(weights="rank").column_names                         # doctest: +SKIP
        ['id', 'source', 'score', 'messages', 'weight']
    """

    target: str
    path: Path
    method: str
    policy: PolicyConfig
    picks: pa.Table
    refused: pa.Table
    shortfall: str | None = None
    card: Mapping[str, str] = field(default_factory=dict)
    """What the picks were made from and by, by what it is; see `describe_card`."""

    @property
    def key(self) -> str:
        """The name of its files: that of the target and, if it has one, its own."""
        return self.policy.selection_of(self.target)

    @property
    def name(self) -> str:
        """Its own name, to be read."""
        return self.policy.name or "(unnamed)"

    @property
    def num_tokens(self) -> int:
        """How many tokens the picks have."""
        return sum(self.picks["num_tokens"].to_pylist())

    @property
    def messages_path(self) -> Path:
        """The file with the picks in one schema."""
        return self.path.parent.parent / layout.messages(self.key)

    def rows(self) -> list[dict[str, Any]]:
        """Return the picks as they came, best first: the fields of the pool's own rows."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def weights(
        self, kind: WeightKind | None = None, temperature: float | None = None
    ) -> Float[np.ndarray, " pick"]:
        """Return a weight per pick, of mean 1; by default those of its policy.

        `kind`: `rank`, `softmax` or `none`; `temperature` as `policy.temperature`.

        Raises:
            ConfigError: If one of them is not allowed.
        """
        given = {"weights": kind, "temperature": temperature}
        policy = PolicyConfig.build(
            self.policy.model_dump() | {k: v for k, v in given.items() if v is not None}
        )
        scores = self.picks["score"].to_numpy()
        return pick_weights(scores, policy.weights, policy.temperature)

    def dataset(
        self, weights: WeightKind | None = None, temperature: float | None = None
    ) -> Dataset:
        """Return the picks as a `datasets.Dataset`: `messages`, beside `id`, `source`, `score`.

        And `weight`, see `weights`; `tools` where some pick has any. Its `info.description` says
        what they were picked by.

        Raises:
            ConfigError: If `weights` or `temperature` is not allowed.
        """
        import datasets

        own = self.weights(weights, temperature).tolist()
        with self.messages_path.open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        rows = [line | {"weight": weight} for line, weight in zip(lines, own, strict=True)]
        found = datasets.Dataset.from_list(rows)
        found.info.description = describe_card(self.card)
        return found

    def __repr__(self) -> str:
        return in_words(self._title, self.picks, self.path)

    def _repr_html_(self) -> str:
        return as_html(self._title, self.picks, self.messages_path)

    @property
    def _title(self) -> str:
        count, tokens = len(self.picks), self.num_tokens
        by = f"by {self.method}: {shorten_policy(self.policy)}"
        return f"{count:,} picks for {self.target}, {tokens:,} tokens, {by}"


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
    picked = rankings[rows, own]
    reasons = reasons.append_column("score", pa.array(picked))
    if policy.weights != "none":
        weights = pick_weights(picked, policy.weights, policy.temperature)
        reasons = reasons.append_column("weight", pa.array(weights))
    shares = projected_shares(job.folder.path, job.config.method, name, rows)
    reasons = reasons.append_column("projected_share", shares)
    reasons = _append_winners(reasons, target, winners)
    made_by = {"target": name, "method": job.config.method, "policy": policy.model_dump_json()}
    made_by |= {"shortfall": picks.shortfall or "", "card": json.dumps(card(job, name))}
    reasons = reasons.replace_schema_metadata(made_by)
    key = policy.selection_of(name)
    job.path(layout.SELECTED).mkdir(exist_ok=True)
    write_lines = partial(_write_lines, job.pool.take(rows, ["raw"]))
    write_atomically(job.path(layout.picks(key)), write_lines)
    write_as_messages = partial(write_messages, job.pool, columns, reasons)
    write_atomically(job.path(layout.messages(key)), write_as_messages)
    write_atomically(job.path(layout.reasons(key)), partial(pq.write_table, reasons))
    refusals = _refusals(job.pool, picks)
    write_atomically(job.path(layout.refusals(key)), partial(pq.write_table, refusals))


def read_selection(run: Path, key: str) -> Selection:
    """Return a stored selection, by its key."""
    picks = pq.read_table(run / layout.reasons(key))
    made_by = {name.decode(): value.decode() for name, value in picks.schema.metadata.items()}
    return Selection(
        target=made_by["target"],
        path=run / layout.picks(key),
        method=made_by["method"],
        policy=PolicyConfig.model_validate_json(made_by["policy"]),
        picks=picks,
        refused=pq.read_table(run / layout.refusals(key)),
        shortfall=made_by["shortfall"] or None,
        card=json.loads(made_by["card"]),
    )


@translate_os_errors()
def list_selections(run: str | Path) -> list[Selection]:
    """Return all selections of a run, by target, the one without a name first.

    Raises:
        RunError: If the folder holds none.
    """
    read_config(run)  # is it a run?
    found = read_selections(Run(local_folder(run, fetch=False)))
    if not found:
        raise RunError(f"{run} holds no picks yet; run `gradsift select` with it")
    return found


def overlap(one: Selection, other: Selection) -> float:
    """Return the Jaccard similarity of two selections: rows in both over rows in either."""
    return jaccard(*(each.picks["row"].to_pylist() for each in (one, other)))


def jaccard(one: Collection[int], other: Collection[int]) -> float:
    """Return the share of the rows of either that both have.

    >>> jaccard([1, 2, 3], [2, 3, 4])
    0.5
    """
    rows, others = set(one), set(other)
    return len(rows & others) / len(rows | others)


def read_selections(folder: Run) -> list[Selection]:
    """Return all selections of a run folder, by target, the one without a name first.

    One that was broken off, is damaged, or was written by an earlier version is left out, and the
    log says so.
    """
    found = []
    for path in sorted((folder.path / layout.SELECTED).glob(f"*{_REASONS}")):
        key = path.name.removesuffix(_REASONS)
        if not folder.has_manifest(layout.selection(key)):  # as `*.refused.parquet` has none
            continue
        if fault := folder.fault_of(layout.selection(key), {"version": FILES_VERSION}):
            logger.warning(
                "left out: %s; `gradsift select` with its name and policy makes it again", fault
            )
            continue
        found.append(read_selection(folder.path, key))
    return sorted(found, key=lambda selection: (selection.target, selection.policy.name or ""))


def kept_targets(job: Job, selections: Iterable[Selection]) -> list[str]:
    """Return the targets not asked for now whose picks are of this pool and adapter."""
    found = set()
    for selection in selections:
        sources = job.folder.inputs_of(layout.selection(selection.key))["sources"]
        shared = (job.inputs.pool_stage, job.inputs.warmup_stage)
        if all(sources.get(s.name, s.fingerprint) == s.fingerprint for s in shared):
            found.add(selection.target)
    return sorted(found - {*job.targets})


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

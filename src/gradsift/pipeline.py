"""The main job as a straight line: data, what the method measures, scores, picks.

Every stage is named and its inputs are written down before any work begins, so that a folder made
with other settings is noticed at once and a killed run goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from gradsift.config import Config, PolicyConfig, merge
from gradsift.data import EncodedSet, Encoder, encode_set, resolve
from gradsift.errors import DataError
from gradsift.export import export_entries
from gradsift.job import Inputs, Job
from gradsift.methods import METHODS
from gradsift.policies import Candidates, Picks, check_policy, pick
from gradsift.repeats import Texts
from gradsift.scores import Scores
from gradsift.stages import Plan, data_sets, scores_file
from gradsift.store import Run, Stage, open_run, write_atomically
from gradsift.types import RunResult, Selection

logger = logging.getLogger(__name__)


def select(  # noqa: PLR0913
    *,
    model: str,
    pool: str | Sequence[str],
    target: Mapping[str, str | Sequence[str]],
    output_dir: str | Path,
    budget: str = "5%",
    method: str = "gist",
    settings: Mapping[str, Any] | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Pick from `pool`, for each named target, what helps it most within the budget.

    `settings` holds everything else by section, as in a configuration file. Run it again with the
    same folder to go on after a crash, or with another budget, policy or method: what is stored is
    used again.

    Example:
        >>> result = gradsift.select(                           # doctest: +SKIP
        ...     model="Qwen/Qwen2.5-1.5B", pool="data/*.jsonl",
        ...     target={"gsm8k": "gsm8k_dev.jsonl"}, output_dir="runs/gsm8k",
        ...     settings={"lora": {"rank": 64}})
        >>> result.selections["gsm8k"].picks.to_pandas()        # doctest: +SKIP

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    config = configure(
        model=model, pool=pool, target=target, budget=budget, method=method, settings=settings
    )
    return run(config, output_dir, strict, overwrite)


def configure(
    *,
    model: str,
    pool: str | Sequence[str],
    target: Mapping[str, str | Sequence[str]],
    budget: str = "5%",
    method: str = "gist",
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration that the arguments of `select` stand for.

    Raises:
        ConfigError: If a setting is unknown or its value is not allowed.
    """
    given = {
        "method": method,
        "model": {"name": str(model)},
        "data": {"pool": pool, "targets": dict(target)},
        "policy": {"budget": budget},
    }
    return Config.build(merge(given, settings or {}))


def run(
    config: Config, output_dir: str | Path, strict: bool = False, overwrite: bool = False
) -> RunResult:
    """Run a whole configuration; see `select`.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    plan = Plan.of(config)
    METHODS[config.method].check(config)
    with open_run(Path(output_dir)) as folder:
        folder.prepare(plan, overwrite)
        if not (folder.path / "config.yaml").exists():
            folder.write_config(config)
        job = encode(plan, folder, strict)
        check_budgets(job, [config.policy.budget])
        scored = measure(job, plan)
        for name in job.targets:
            with folder.stage(plan.selections[name]) as todo:
                if todo:
                    _select(job, name, scored()[name])
        _export(job)
        folder.write_config(config)  # only now is it that of what the folder holds
        facts = folder.facts(plan)
        return RunResult(
            path=folder.path,
            method=config.method,
            selections={name: read_selection(folder.path, name) for name in job.targets},
            num_pool=len(job.pool),
            num_rejected=(folder.path / "rejected.jsonl").read_bytes().count(b"\n"),
            seconds={name: manifest["seconds"] for name, manifest in facts.items()},
            peak_memory=max(manifest["peak_memory_bytes"] for manifest in facts.values()),
        )


def measure(job: Job, plan: Plan) -> Callable[[], Mapping[str, Scores]]:
    """Do what the method has not done yet and write its scores; return what gives them.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    method = METHODS[job.config.method]
    method.measure(job)

    @cache
    def scored() -> Mapping[str, Scores]:
        return method.scores(job)

    with job.folder.stage(plan.scores) as todo:
        if todo:
            _write_scores(job, method.facts(job), scored())
    return scored


def check_budgets(job: Job, budgets: Sequence[str]) -> None:
    """Find out before the work whether the policy fits the pool at each of some budgets.

    Raises:
        ConfigError: As `check_policy`.
    """
    sources, num_tokens = _column(job.pool, "source"), _column(job.pool, "num_tokens")
    for budget in budgets:
        policy = job.config.policy.model_copy(update={"budget": budget})
        check_policy(policy, sources.to_pylist(), num_tokens.to_numpy())


def encode(plan: Plan, folder: Run, strict: bool) -> Job:
    """Return the job of a run, its pool and targets encoded now or before.

    Raises:
        DataError: If one has no usable row, or any unusable one under `strict`.
    """
    from gradsift.model import Models

    config = plan.inputs.config
    directory, sets = folder.path / "data", data_sets(config)
    encode_sets(config, sets, plan.inputs.data, folder, directory, strict)
    rejected = b"".join((directory / f"{name}.rejected.jsonl").read_bytes() for name in sets)
    if strict and rejected:
        first = rejected.decode().partition("\n")[0]
        raise DataError(f"unusable rows under --strict, the first: {first}")
    write_atomically(folder.path / "rejected.jsonl", rejected)
    return open_job(plan.inputs, folder, Models(config.model))


def encode_sets(
    config: Config,
    sets: Mapping[str, tuple[str, ...]],
    stages: Mapping[str, Stage],
    folder: Run,
    directory: Path,
    strict: bool = False,
) -> None:
    """Encode what is not encoded yet, each set into a file of its name in the directory.

    Raises:
        DataError: If one has no usable row, or any unusable one under `strict`.
    """
    encoder = None
    for name, specs in sets.items():
        with folder.stage(stages[name]) as todo:
            if todo:
                encoder = encoder or _encoder(config)
                columns = config.data.columns
                encode_set(name, resolve(specs), encoder, columns, directory, strict)


def open_job(inputs: Inputs, folder: Run, models: Any) -> Job:
    """Return the job of a run whose pool and targets are encoded."""
    directory = folder.path / "data"
    targets = {
        name: EncodedSet(directory / f"target.{name}.parquet")
        for name in inputs.config.data.targets
    }
    return Job(inputs, folder, EncodedSet(directory / "pool.parquet"), targets, models)


def _encoder(config: Config) -> Encoder:
    from gradsift.model import context_length, load_tokenizer, resolve_device

    resolve_device(config.model)  # before the work, not after it
    length = context_length(config.model.name) or config.data.max_length
    if length < config.data.max_length:
        logger.info("examples are cut to the model's %d positions", length)
    return Encoder(
        load_tokenizer(config.model), min(length, config.data.max_length), config.data.template
    )


def _write_scores(job: Job, facts: Mapping[str, np.ndarray], scored: Mapping[str, Scores]) -> None:
    """Write a row per pool example: what it is, what the method knows of it, its scores."""
    table = job.pool.table(["row", "id", "source", "num_tokens", "num_supervised"])
    for name, values in facts.items():
        table = table.append_column(name, pa.array(values))
    for name, target in job.targets.items():
        score, best = scored[name].scores()
        table = table.append_column(f"{name}/score", pa.array(score))
        projected = scored[name].projected_norms(slice(None))
        if projected is not None:
            table = table.append_column(f"{name}/projected_norm", pa.array(projected))
        if best is not None:
            table = table.append_column(f"{name}/best", _column(target, "id").take(pa.array(best)))
    path = job.path(scores_file(job.config.method))
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(pq.write_table, table))


def choose(
    job: Job, name: str, turns: Float[np.ndarray, "example turn"], policy: PolicyConfig
) -> Picks:
    """Return what a policy picks for a target from the scores of those whose turn it can be."""
    columns = job.config.data.columns
    sources, num_tokens = _column(job.pool, "source"), _column(job.pool, "num_tokens")
    texts = _texts(job.pool, columns)
    candidates = Candidates(texts, sources.to_pylist(), num_tokens.to_numpy())
    return pick(turns, candidates, _texts(job.targets[name], columns), policy)


def _select(job: Job, name: str, scores: Scores) -> None:
    """Write the picks of one target: their own bytes, and why each was picked or passed over."""
    policy, target = job.config.policy, job.targets[name]
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
    why = why.append_column("projected_share", _shares(job, name, rows))
    winners = scores.winners(policy, rows, own)
    for column, of_target in {"best": "id", "task": "task"}.items():
        values = pa.nulls(len(rows), pa.string())
        if winners is not None:
            values = _column(target, of_target).take(pa.array(winners))
        why = why.append_column(column, values)
    why = why.replace_schema_metadata({"shortfall": picks.shortfall or ""})
    refused = _described(job.pool, np.array([r.row for r in picks.refused], np.int64))
    for column in ("reason", "like"):
        values = pa.array([getattr(r, column) for r in picks.refused], pa.string())
        refused = refused.append_column(column, values)
    lines = job.pool.take(rows, ["raw"])["raw"].to_pylist()
    path = job.path("selected")
    path.mkdir(exist_ok=True)
    write_atomically(path / f"{name}.jsonl", b"".join(line + b"\n" for line in lines))
    write_atomically(path / f"{name}.parquet", partial(pq.write_table, why))
    write_atomically(path / f"{name}.refused.parquet", partial(pq.write_table, refused))


def _export(job: Job) -> None:
    """Write beside the picks the entries by which other trainers find them."""
    schemas = {}
    for name in job.targets:
        rows = read_selection(job.folder.path, name).picks["row"].to_numpy()
        schemas[name] = set(job.pool.take(rows, ["schema"])["schema"].to_pylist())
    export_entries(job.path("selected"), schemas, job.config.data.columns)


def _shares(job: Job, name: str, rows: np.ndarray) -> pa.Array:
    """Return ‖c‖/‖g‖ of some rows, nulls where the method knows no subspace."""
    path = job.path(scores_file(job.config.method))
    columns = ["gradient_norm", f"{name}/projected_norm"]
    if columns[1] not in pq.read_schema(path).names:
        return pa.nulls(len(rows), pa.float32())
    norms, projected = (column.to_numpy()[rows] for column in pq.read_table(path, columns=columns))
    return pa.array(np.divide(projected, norms, where=norms > 0, out=norms * 0))


def read_scores(run: Path, method: str, target: str) -> Float[np.ndarray, " example"]:
    """Return a method's stored scores of the whole pool for a target."""
    name = f"{target}/score"
    return pq.read_table(run / scores_file(method), columns=[name])[name].to_numpy()


def read_selection(run: Path, name: str) -> Selection:
    """Return the stored picks for one target."""
    path = run / "selected" / f"{name}.jsonl"
    picks = pq.read_table(path.with_name(f"{name}.parquet"))
    refused = pq.read_table(path.with_name(f"{name}.refused.parquet"))
    shortfall = (picks.schema.metadata or {}).get(b"shortfall", b"").decode()
    return Selection(name, path, picks, refused, shortfall or None)


@dataclass(frozen=True)
class SourceShare:
    """What one source of the pool has among the picks and in the pool, as shares of the rows."""

    source: str
    num_picks: int
    of_picks: float
    of_pool: float


def source_shares(result: RunResult, name: str) -> list[SourceShare]:
    """Return where the picks for a target come from, the largest source first."""
    in_pool = Counter(result.scores(["source"])["source"].to_pylist())
    in_picks = Counter(result.selections[name].picks["source"].to_pylist())
    return [
        SourceShare(source, count, count / in_picks.total(), in_pool[source] / in_pool.total())
        for source, count in in_picks.most_common()
    ]


def _described(pool: EncodedSet, rows: np.ndarray) -> pa.Table:
    table = pool.take(rows, ["id", "source", "num_tokens"])
    return table.add_column(0, "row", pa.array(rows))


def _column(encoded: EncodedSet, name: str) -> pa.Array:
    column = encoded.table([name])[name].combine_chunks()
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _texts(encoded: EncodedSet, columns: Mapping[str, str]) -> Texts:
    return Texts(
        *(_column(encoded, name).to_pylist() for name in ("id", "text_hash", "prompt_hash")),
        conversations=lambda rows: encoded.conversations(rows, columns),
    )

"""The main job as a straight line: data, warm-up, subspaces, coordinates, scores, picks.

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

from gradsift.config import Config, merge
from gradsift.data import EncodedSet, Encoder, encode_set, resolve
from gradsift.errors import DataError
from gradsift.methods import gist
from gradsift.policies import Candidates, check_policy, pick
from gradsift.repeats import Texts
from gradsift.scores import Alignment
from gradsift.shards import load_pool
from gradsift.stages import Plan, data_sets
from gradsift.store import Run, open_run, read_checkpoints, write_atomically
from gradsift.types import Checkpoint, RunResult, Selection

logger = logging.getLogger(__name__)


def select(  # noqa: PLR0913
    *,
    model: str,
    pool: str | Sequence[str],
    target: Mapping[str, str | Sequence[str]],
    output_dir: str | Path,
    budget: str = "5%",
    settings: Mapping[str, Any] | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Pick from `pool`, for each named target, what helps it most within the budget.

    `settings` holds everything else by section, as in a configuration file. Run it again with the
    same folder to go on after a crash, or with another budget or policy to pick anew in seconds.

    Example:
        >>> result = gradsift.select(                           # doctest: +SKIP
        ...     model="Qwen/Qwen2.5-1.5B", pool="data/*.jsonl",
        ...     target={"gsm8k": "gsm8k_dev.jsonl"}, output_dir="runs/gsm8k",
        ...     settings={"lora": {"rank": 64}})
        >>> result.selections["gsm8k"].picks.to_pandas()        # doctest: +SKIP

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    config = configure(model=model, pool=pool, target=target, budget=budget, settings=settings)
    return run(config, output_dir, strict, overwrite)


def configure(
    *,
    model: str,
    pool: str | Sequence[str],
    target: Mapping[str, str | Sequence[str]],
    budget: str = "5%",
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration that the arguments of `select` stand for.

    Raises:
        ConfigError: If a setting is unknown or its value is not allowed.
    """
    given = {
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
    with open_run(Path(output_dir)) as folder:
        folder.prepare(plan, overwrite)
        if not (folder.path / "config.yaml").exists():
            folder.write_config(config)
        pool, targets = encode(config, plan, folder, strict)
        sources, num_tokens = _column(pool, "source"), _column(pool, "num_tokens")
        check_policy(config.policy, sources.to_pylist(), num_tokens.to_numpy())
        checkpoints = _warm_up(config, plan, folder, pool)
        model_at = _models(config)
        for name, target in targets.items():
            with folder.stage(plan.subspaces[name]) as todo:
                if todo:
                    directory = folder.path / "targets" / name
                    gist.measure_subspaces(config, target, checkpoints, directory, model_at)
        with folder.stage(plan.coordinates) as todo:
            if todo:
                gist.project_pool(config, pool, targets, checkpoints, folder.path, model_at)

        @cache
        def aligned(name: str) -> Alignment:
            return gist.align(config.gist, folder.path, name, targets[name], checkpoints)

        with folder.stage(plan.scores) as todo:
            if todo:
                _score(folder, pool, targets, aligned, checkpoints)
        for name, target in targets.items():
            with folder.stage(plan.selections[name]) as todo:
                if todo:
                    _select(config, folder, name, pool, target, aligned(name))
        folder.write_config(config)  # only now is it that of what the folder holds
        facts = folder.facts(plan)
        return RunResult(
            path=folder.path,
            selections={name: read_selection(folder.path, name) for name in targets},
            num_pool=len(pool),
            num_rejected=(folder.path / "rejected.jsonl").read_bytes().count(b"\n"),
            seconds={name: manifest["seconds"] for name, manifest in facts.items()},
            peak_memory=max(manifest["peak_memory_bytes"] for manifest in facts.values()),
        )


def encode(
    config: Config, plan: Plan, folder: Run, strict: bool
) -> tuple[EncodedSet, dict[str, EncodedSet]]:
    """Return pool and targets, encoded now or before.

    Raises:
        DataError: If one has no usable row, or any unusable one under `strict`.
    """
    directory, encoder, encoded = folder.path / "data", None, {}
    sets = data_sets(config)
    for name, specs in sets.items():
        with folder.stage(plan.data[name]) as todo:
            if todo:
                encoder = encoder or _encoder(config)
                columns = config.data.columns
                encode_set(name, resolve(specs), encoder, columns, directory, strict)
        encoded[name] = EncodedSet(directory / f"{name}.parquet")
    rejected = b"".join((directory / f"{name}.rejected.jsonl").read_bytes() for name in sets)
    if strict and rejected:
        first = rejected.decode().partition("\n")[0]
        raise DataError(f"unusable rows under --strict, the first: {first}")
    write_atomically(folder.path / "rejected.jsonl", rejected)
    return encoded.pop("pool"), dict(zip(config.data.targets, encoded.values(), strict=True))


def _encoder(config: Config) -> Encoder:
    from gradsift.model import context_length, load_tokenizer, resolve_device

    resolve_device(config.model)  # before the work, not after it
    length = context_length(config.model.name) or config.data.max_length
    if length < config.data.max_length:
        logger.info("examples are cut to the model's %d positions", length)
    return Encoder(
        load_tokenizer(config.model), min(length, config.data.max_length), config.data.template
    )


def _warm_up(config: Config, plan: Plan, folder: Run, pool: EncodedSet) -> list[Checkpoint]:
    directory = folder.path / "warmup"
    with folder.stage(plan.warmup) as todo:
        if todo:
            from gradsift.warmup import warm_up

            warm_up(config, pool, directory)
    return read_checkpoints(directory)


def _models(config: Config) -> gist.ModelAt:
    """Return the models of a run; nothing is loaded before the first is asked for."""

    @cache
    def switch() -> Callable[[Path], Any]:
        from gradsift.model import AdapterSwitch

        return AdapterSwitch(config.model)

    return lambda checkpoint: switch()(checkpoint.path)


def _score(
    folder: Run,
    pool: EncodedSet,
    targets: Mapping[str, EncodedSet],
    aligned: Callable[[str], Alignment],
    checkpoints: Sequence[Checkpoint],
) -> None:
    """Write `scores.parquet`: a row per pool example, losses and norms at the last checkpoint."""
    table = pool.table(["row", "id", "source", "num_tokens", "num_supervised"])
    stored = load_pool(folder.path, checkpoints[-1], ("loss", "gradient_norm"))
    for name, values in stored.items():
        table = table.append_column(name, pa.array(values))
    for name, target in targets.items():
        score, best = aligned(name).scores()
        projected = np.linalg.norm(aligned(name).views[-1].pool, axis=1)
        table = table.append_column(f"{name}/score", pa.array(score))
        table = table.append_column(f"{name}/projected_norm", pa.array(projected))
        table = table.append_column(f"{name}/best", _column(target, "id").take(pa.array(best)))
    write_atomically(folder.path / "scores.parquet", partial(pq.write_table, table))


def _select(
    config: Config,
    folder: Run,
    name: str,
    pool: EncodedSet,
    target: EncodedSet,
    alignment: Alignment,
) -> None:
    """Write the picks of one target: their own bytes, and why each was picked or passed over."""
    policy, columns = config.policy, config.data.columns
    sources, num_tokens = _column(pool, "source"), _column(pool, "num_tokens")
    candidates = Candidates(_texts(pool, columns), sources.to_pylist(), num_tokens.to_numpy())
    turns = alignment.turns(policy)
    picks = pick(turns, candidates, _texts(target, columns), policy)
    if picks.shortfall:
        logger.warning("%s: %s", name, picks.shortfall)
    reasons = Counter(refusal.reason for refusal in picks.refused)
    told = ", ".join(f"{count} refused: {reason}" for reason, count in reasons.most_common())
    logger.info("%s: %d picks, %s", name, len(picks.rows), told or "none refused")
    rows, own = np.array(picks.rows, np.int64), np.array(picks.turns, np.int64)
    winners = alignment.winners(policy, rows, own)
    why = _described(pool, rows).add_column(0, "rank", pa.array(np.arange(1, len(rows) + 1)))
    for column, values in {
        "score": turns[rows, own],
        "projected_share": alignment.views[-1].projected_share(rows),
        "best": _column(target, "id").take(pa.array(winners)),
        "task": _column(target, "task").take(pa.array(winners)),
    }.items():
        why = why.append_column(column, pa.array(values))
    why = why.replace_schema_metadata({"shortfall": picks.shortfall or ""})
    refused = _described(pool, np.array([r.row for r in picks.refused], np.int64))
    for column in ("reason", "like"):
        values = pa.array([getattr(r, column) for r in picks.refused], pa.string())
        refused = refused.append_column(column, values)
    lines = pool.take(rows, ["raw"])["raw"].to_pylist()
    path = folder.path / "selected"
    path.mkdir(exist_ok=True)
    write_atomically(path / f"{name}.jsonl", b"".join(line + b"\n" for line in lines))
    write_atomically(path / f"{name}.parquet", partial(pq.write_table, why))
    write_atomically(path / f"{name}.refused.parquet", partial(pq.write_table, refused))


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
    everything = pq.read_table(result.path / "scores.parquet", columns=["source"])["source"]
    in_pool = Counter(everything.to_pylist())
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

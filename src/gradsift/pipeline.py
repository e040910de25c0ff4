"""The main job as a straight line: data, what the method measures, scores, picks.

Every stage is named and its inputs are written down before any work begins, so that a folder made
with other settings is noticed at once and a killed run goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.choosing import read_selection, write_selection
from gradsift.config import Config, merge
from gradsift.data import Encoder, encode_set, log_what_is_left, resolve
from gradsift.errors import DataError, system_faults_told
from gradsift.executors import choose_executor
from gradsift.export import export_entries
from gradsift.job import Job, open_job
from gradsift.methods import METHODS
from gradsift.policies import check_policy
from gradsift.report import leave_report
from gradsift.scores import Scores
from gradsift.stages import Plan, data_sets, scores_file
from gradsift.store import CONFIG, Run, Stage, open_run, room_for, write_atomically
from gradsift.types import RunResult

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

    `output_dir` is a folder, or a URL that fsspec knows (`s3://bucket/run`). `settings` holds
    everything else by section, as in a configuration file. Run it again with the
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


@system_faults_told()
def run(
    config: Config, output_dir: str | Path, strict: bool = False, overwrite: bool = False
) -> RunResult:
    """Run a whole configuration; see `select`.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    plan = Plan.of(config)
    METHODS[config.method].check(config)
    choose_executor(config.engine)  # before the work: is it there?
    with open_run(output_dir) as folder:
        folder.prepare(plan, overwrite)
        if damage := folder.damage(CONFIG):
            logger.warning("%s: it is written anew", damage)
        if damage or not (folder.path / CONFIG).exists():
            folder.write_config(config)
        job = encode(plan, folder, strict)
        check_budgets(job, [config.policy.budget])
        scored = measure(job, plan)
        for name in job.targets:
            with folder.stage(plan.selections[name]) as todo:
                if todo:
                    write_selection(job, name, scored()[name])
        _export(job)
        folder.write_config(config)  # only now is it that of what the folder holds
        leave_report(job, plan)
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
    sources, num_tokens = job.pool.column("source"), job.pool.column("num_tokens")
    for budget in budgets:
        policy = job.config.policy.model_copy(update={"budget": budget})
        check_policy(policy, sources, num_tokens.to_numpy())


def encode(plan: Plan, folder: Run, strict: bool) -> Job:
    """Return the job of a run, its pool and targets encoded now or before.

    Raises:
        DataError: If one has no usable row, or any unusable one under `strict`.
    """
    config = plan.inputs.config
    directory, sets = folder.path / "data", data_sets(config)
    encode_sets(config, sets, plan.inputs.data, folder, directory, strict)
    rejected = b"".join((directory / f"{name}.rejected.jsonl").read_bytes() for name in sets)
    if strict and rejected:
        first = rejected.decode().partition("\n")[0]
        raise DataError(f"unusable rows under --strict, the first: {first}")
    write_atomically(folder.path / "rejected.jsonl", rejected)
    return open_job(plan.inputs, folder)


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
                log_what_is_left(specs)
                encoder = encoder or _encoder(config)
                columns = config.data.columns
                with room_for(directory / f"{name}.parquet"):
                    encode_set(name, resolve(specs), encoder, columns, directory, strict)


def _encoder(config: Config) -> Encoder:
    from gradsift.model import foreign_faults_told, known_sizes, load_tokenizer, resolve_device

    resolve_device(config.model)  # before the work, not after it
    sizes, length = known_sizes(config.model), config.data.max_length
    if sizes.positions is not None and sizes.positions < length:
        length = sizes.positions
        logger.info("examples are cut to the model's %d positions", length)
    tokenizer = load_tokenizer(config.model)
    with foreign_faults_told(f"the tokenizer of {config.model.name!r}"):
        return Encoder(tokenizer, length, config.data.template, sizes.embeddings)


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
            ids = target.column("id").dictionary_encode()  # a number for each row, not a text
            won = pa.DictionaryArray.from_arrays(ids.indices.take(pa.array(best)), ids.dictionary)
            table = table.append_column(f"{name}/best", won)
    path = job.path(scores_file(job.config.method))
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(pq.write_table, table))


def _export(job: Job) -> None:
    """Write beside the picks the entries by which other trainers find them."""
    schemas = {}
    for name in job.targets:
        rows = read_selection(job.folder.path, name).picks["row"].to_numpy()
        schemas[name] = set(job.pool.take(rows, ["schema"])["schema"].to_pylist())
    export_entries(job.path("selected"), schemas, job.config.data.columns)

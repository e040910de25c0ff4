"""The main job as a straight line: data, what the method measures, scores, picks.

Every stage is named and its inputs are written down before any work begins, so that a folder made
with other settings is noticed at once and a killed run goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.config import Config
from gradsift.data.encoded import encode_set
from gradsift.data.encoding import Encoder
from gradsift.data.sources import log_what_is_left, resolve
from gradsift.data.stages import data_sets
from gradsift.errors import DataError, system_faults_told
from gradsift.executors.base import choose_executor
from gradsift.methods.job import Job, open_job
from gradsift.methods.registry import METHODS
from gradsift.report.write import leave_report
from gradsift.runs.atomic import room_for, write_atomically
from gradsift.runs.folder import Run
from gradsift.runs.layout import CONFIG
from gradsift.runs.opening import open_run
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Scores
from gradsift.sections import merge
from gradsift.selection.export import export_entries
from gradsift.selection.picks import Selection, read_selection, write_selection
from gradsift.selection.policies import check_policy
from gradsift.selection.score_table import write_scores
from gradsift.selection.stages import Plan

if TYPE_CHECKING:
    import pyarrow as pa

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
            write_scores(job, method.facts(job), scored())
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
    from gradsift.models.files import foreign_faults_told, known_sizes, load_tokenizer
    from gradsift.models.loading import resolve_device

    resolve_device(config.model)  # before the work, not after it
    sizes, length = known_sizes(config.model), config.data.max_length
    if sizes.positions is not None and sizes.positions < length:
        length = sizes.positions
        logger.info("examples are cut to the model's %d positions", length)
    tokenizer = load_tokenizer(config.model)
    with foreign_faults_told(f"the tokenizer of {config.model.name!r}"):
        return Encoder(tokenizer, length, config.data.template, sizes.embeddings)


def _export(job: Job) -> None:
    """Write beside the picks the entries by which other trainers find them."""
    schemas = {}
    for name in job.targets:
        rows = read_selection(job.folder.path, name).picks["row"].to_numpy()
        schemas[name] = set(job.pool.take(rows, ["schema"])["schema"].to_pylist())
    export_entries(job.path("selected"), schemas, job.config.data.columns)


@dataclass(frozen=True)
class RunResult:
    """What a run left in its folder: selections by target, seconds by stage.

    `peak_memory` is the largest resident size that any stage's process had reached, in bytes.
    """

    path: Path
    method: str
    selections: Mapping[str, Selection]
    num_pool: int
    num_rejected: int
    seconds: Mapping[str, float]
    peak_memory: int

    def scores(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the method's scores: one row per pool example, `T/score` and so on per target."""
        wanted = list(columns) if columns is not None else None
        return pq.read_table(self.path / "scores" / f"{self.method}.parquet", columns=wanted)

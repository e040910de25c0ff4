"""The main job as a straight line: data, what the method measures, scores, picks.

Every stage is named and its inputs are written down before any work begins, so that a folder made
with other settings is noticed at once and a killed run goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.config import Config, DataConfig
from gradsift.data.given import Data, keep_given, keep_targets
from gradsift.data.groups import GroupEncoder
from gradsift.data.sets import check_first_rows, count_rows, data_sets, encode_sets
from gradsift.errors import (
    ConfigError,
    DataError,
    GradsiftError,
    check_installed,
    translate_os_errors,
)
from gradsift.executors.choice import choose_executor
from gradsift.methods.job import Job, open_job
from gradsift.methods.pool_index import check_index, stages_of_index, take_from_index
from gradsift.methods.registry import METHODS
from gradsift.report.write import build_report
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.folder import Run
from gradsift.runs.indexes import AskedIndex, index_settings
from gradsift.runs.opening import local_folder, locked_run
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Scores, refuse_turns
from gradsift.sections import merge, read_yaml
from gradsift.selection.export import export_entries
from gradsift.selection.picks import (
    kept_targets,
    read_selection,
    read_selections,
    write_selection,
)
from gradsift.selection.policies import check_policy
from gradsift.selection.run_result import RunResult, collect_result
from gradsift.selection.score_table import write_scores
from gradsift.selection.stages import RunStages
from gradsift.types import Budget

if TYPE_CHECKING:
    from gradsift.models.cache import ModelCache

logger = logging.getLogger(__name__)


def select(  # noqa: PLR0913
    *,
    model: str | Path | None = None,
    pool: Data | None = None,
    target: Mapping[str, Data] | Data,
    output_dir: str | Path,
    index: str | Path | None = None,
    budget: str = "5%",
    method: str = "gist",
    settings: Mapping[str, Any] | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Pick from `pool`, for each named target, what helps it most within the budget.

    `pool` and each target are files (paths, globs, Hub ids), or what is held in memory: a
    `datasets.Dataset`, a list of dicts, a table of pandas or Arrow, which is written into the run
    folder. A target that is given without a name is called after its file, or `target`.
    `model` (a folder or Hub id; a PEFT folder stands for its base model and for `warmup.adapter`)
    and `pool` are to be given, or an `index` of them (`gradsift.index`), out of which the
    scores are read, approximately and without a pass. `output_dir` is a folder, or a URL that
    fsspec knows (`s3://bucket/run`). `settings` holds everything else by section, as in a
    configuration file. Run it again with the same folder to go on after a crash, or with another
    target, budget, policy or method: what is stored is used again.

    Examples:
        >>> result = gradsift.select(                           # doctest: +SKIP
        ...     model="Qwen/Qwen2.5-1.5B", pool="data/*.jsonl",
        ...     target={"gsm8k": "gsm8k_dev.jsonl"}, output_dir="runs/gsm8k",
        ...     settings={"lora": {"rank": 64}})
        >>> result.selections["gsm8k"].picks.column_names[:4]   # doctest: +SKIP
        ['rank', 'row', 'id', 'source']

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    config = configure(
        model=model, pool=pool, target=target, output_dir=output_dir, index=index, budget=budget,
        method=method, settings=settings,
    )  # fmt: skip
    return run(config, output_dir, strict, overwrite)


@translate_os_errors()
def configure(  # noqa: PLR0913
    *,
    model: str | Path | None = None,
    pool: Data | None = None,
    target: Mapping[str, Data] | Data,
    output_dir: str | Path,
    index: str | Path | None = None,
    budget: str = "5%",
    method: str = "gist",
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration that the arguments of `select` stand for.

    Raises:
        ConfigError: If a setting is unknown or its value is not allowed.
        DataError: If pool or target are neither files nor rows.
    """
    folder = local_folder(output_dir, fetch=False)
    given: dict[str, Any] = {
        "method": method,
        "data": {"targets": keep_targets(target, folder)},
        "policy": {"budget": budget},
    }
    if model is not None:
        given["model"] = {"name": name_of_model(model)}
    if pool is not None:
        given["data"]["pool"] = keep_given(pool, "pool", folder)
    if index is None:
        return Config.build(merge(given, settings or {}))
    path = {"index": {"path": str(index)}}
    return Config.build(merge(index_settings(index), given, settings or {}, path))


def name_of_model(model: Any) -> str:
    """Return what names a model in the settings.

    Raises:
        ConfigError: If it is no name.
    """
    if isinstance(model, str | Path):
        return str(model)
    raise ConfigError(
        f"model: expected a folder or Hub id, found an object of type {type(model).__name__}: each "
        "process loads the model by itself, and who goes on with the run has to find the same; "
        "save it and its tokenizer with save_pretrained(FOLDER), and give FOLDER"
    )


@translate_os_errors()
def run(
    config: Config,
    output_dir: str | Path,
    strict: bool = False,
    overwrite: bool = False,
    models: ModelCache | None = None,
    index: AskedIndex | None = None,
) -> RunResult:
    """Run a whole configuration; see `select`.

    `models`: where the base model may be loaded; `index`: that which is asked, if it is at hand.

    Examples:
        >>> config = gradsift.Config.build({                    # doctest: +SKIP
        ...     "model": {"name": "Qwen/Qwen2.5-1.5B"}, "lora": {"rank": 64},
        ...     "data": {"pool": "data/*.jsonl", "targets": {"gsm8k": "gsm8k_dev.jsonl"}}})
        >>> gradsift.run(config, "runs/gsm8k").method           # doctest: +SKIP
        'gist'

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    check_settings(config)
    stages = RunStages.of(config, index)
    check_index(stages.inputs)
    with locked_run(output_dir) as folder:
        targets = [stages.inputs.target_stage(name).name for name in config.data.targets]
        planned = [*stages_of_index(folder, stages.inputs), *stages]
        folder.prepare(planned, overwrite, may_change=targets)
        keep_first_config(folder, config)
        take_from_index(folder, stages.inputs)
        job = encode(stages, folder, strict, models)
        check_budgets(job, [config.policy.budget])
        scores = measure(job, stages)
        for name in job.targets:
            _say_what_is_replaced(folder, stages.selections[name])
            with folder.stage(stages.selections[name]) as todo:
                if todo:
                    write_selection(job, name, scores()[name])
        selections = read_selections(folder)
        export_entries(folder.path, [selection.key for selection in selections])
        if others := kept_targets(job, selections):
            logger.info("targets not asked for now, and kept: %s", ", ".join(others))
        kept = None if config.policy.name is None else _what_stands(folder, config.data)
        if kept is None:
            folder.write_config(config)  # only now is it that of what the folder holds
            kept = stages
        build_report(replace(job, inputs=kept.inputs), kept)
        return _result(job, stages)


def check_settings(config: Config, has_targets: bool = True) -> None:
    """Find out before any work, and before anything is looked up, what would stop it.

    Raises:
        ConfigError: If something that has to be installed is not, or settings do not fit together.
    """
    method = METHODS[config.method]
    if has_targets and not config.data.targets:
        raise ConfigError(
            "no target: expected one file of examples of your task at least, as --target NAME=FILE "
            "or data.targets"
        )
    method.check(config)
    if config.index.path and not any(METHODS[own].reads_index for own in config.measuring):
        able = ", ".join(name for name, own in METHODS.items() if own.reads_index)
        raise ConfigError(
            f"an index serves the methods {able}; method={config.method} needs none of it: leave "
            "--index out"
        )
    if not method.compares:
        refuse_turns(config.policy)
    if (kind := config.model.quantization) != "none":
        check_installed("bitsandbytes", f"model.quantization={kind}", "quantized")
    for tracker in config.engine.report_to:
        check_installed(tracker, f"engine.report_to={tracker}", tracker)
    choose_executor(config.engine)


def encode(stages: RunStages, folder: Run, strict: bool, models: ModelCache | None = None) -> Job:
    """Return the job of a run, its pool and targets encoded now or before.

    Raises:
        DataError: If one has no usable row, or any unusable one under `strict`.
    """
    from gradsift.models.loading import load_encoder

    config = stages.inputs.config
    load = partial(load_encoder, config.model, config.data, config.engine)
    sets, encoding = data_sets(config.data), GroupEncoder(load, config.data.columns)
    data_stages, executor = stages.inputs.data_stages, choose_executor(config.engine)
    if folder.find_fault([stages.inputs.pool_stage]):
        check_first_rows(sets, config.data.columns)
        _check_count(config)
    encode_sets(sets, data_stages, folder, encoding, strict, executor)
    own = [folder.path / layout.rejected(name) for name in sets]
    rejected = b"".join(path.read_bytes() for path in own)
    if strict and rejected:  # of a set that was encoded before, without --strict
        first = rejected.decode().partition("\n")[0]
        raise DataError(f"unusable rows under --strict, the first: {first}")
    kept = {*(folder.path / layout.ENCODED).glob(f"*{layout.REJECTED_SUFFIX}")} - {*own}
    rejected += b"".join(path.read_bytes() for path in sorted(kept))  # of other targets
    write_atomically(folder.path / layout.REJECTED, rejected)
    return open_job(stages.inputs, folder, models)


def _check_count(config: Config) -> None:
    """Find out before the pool is encoded whether it has as many rows as are to be picked.

    Raises:
        ConfigError: If it has not.
    """
    budget = Budget.parse(config.policy.budget)
    if budget.unit == "examples":
        wanted = int(budget.amount)
        found = count_rows(config.data.pool, at_most=wanted)
        if found and found < wanted:  # of an empty pool more is told when it is encoded
            raise ConfigError(
                f"a budget of {wanted} examples, but the pool holds {found} rows; ask for less"
            )


def check_budgets(job: Job, budgets: Sequence[str]) -> None:
    """Find out before the work whether the policy fits the pool at each of some budgets.

    Raises:
        ConfigError: As `check_policy`.
    """
    sources, num_tokens = job.pool.column("source"), job.pool.column("num_tokens")
    for budget in budgets:
        policy = job.config.policy.model_copy(update={"budget": budget})
        check_policy(policy, sources, num_tokens.to_numpy())


def measure(job: Job, stages: RunStages) -> Callable[[], Mapping[str, Scores]]:
    """Do what the method has not done yet and write its scores; return what gives them.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    method = METHODS[job.config.method]
    method.measure(job)

    @cache
    def scores() -> Mapping[str, Scores]:
        return method.scores(job)

    with job.folder.stage(stages.scores) as todo:
        if todo:
            write_scores(job, method.facts(job), scores())
    return scores


def _say_what_is_replaced(folder: Run, stage: Stage) -> None:
    """Say that other picks of the same name are about to go, and how to keep them."""
    change = folder.change_of(stage)
    if change and (folder.path / stage.outputs[0]).exists():
        logger.warning(
            "%s is replaced (%s); --name NAME keeps a selection beside it", stage.outputs[0], change
        )


def _what_stands(folder: Run, data: DataConfig) -> RunStages | None:
    """Return the stages of the folder's configuration, if all that it describes is still there.

    A named selection of the same data then leaves it alone, so that `evaluate` and the next command
    go on with its policy.
    """
    config = Config.build(read_yaml(folder.path / layout.CONFIG))
    if config.data != data:
        return None
    try:
        stages = RunStages.of(config)
    except GradsiftError:  # an adapter, say, that is no longer where it was
        return None
    return None if folder.find_fault(stages) else stages


def keep_first_config(folder: Run, config: Config) -> None:
    """Write the configuration before the work, where none is there that could be read."""
    damage = folder.damage(layout.CONFIG)
    if damage:
        logger.warning("%s: it is written anew", damage)
    if damage or not (folder.path / layout.CONFIG).exists():
        folder.write_config(config)


def _result(job: Job, stages: RunStages) -> RunResult:
    path, policy = job.folder.path, job.config.policy
    found = {name: read_selection(path, policy.selection_of(name)) for name in job.targets}
    return collect_result(path, job.config.method, found, job.folder.facts(stages))

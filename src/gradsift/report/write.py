"""The page that explains a selection: one HTML file that needs no network.

What was picked, from where and whether it helps, how sure the choice is, why each, what the target
looks like, what `evaluate` and `geometry` found, and what the run was.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gradsift.config import PolicyConfig
from gradsift.errors import RunError, translate_os_errors
from gradsift.methods.job import Job, open_job
from gradsift.report.exhibits import PARTS, exhibits_fault
from gradsift.report.overview import overview
from gradsift.report.page import render
from gradsift.report.target_page import target_page
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.opening import locked_run, read_config
from gradsift.runs.stage import Stage
from gradsift.selection.picks import Selection, candidates, read_selections
from gradsift.selection.score_table import read_scores, scores_of
from gradsift.selection.stability import can_compare_twice_the_rank, measure_sample, sampling_stage
from gradsift.selection.stages import RunStages

logger = logging.getLogger(__name__)


@translate_os_errors()
def write_report(run: str | Path) -> Path:
    """Write `report.html` anew from what a finished run holds, and return its path.

    Examples:
        >>> gradsift.write_report("runs/gsm8k")                        # doctest: +SKIP
        PosixPath('runs/gsm8k/report.html')

    Raises:
        RunError: If the folder holds no finished run.
    """
    config = read_config(run)
    stages = RunStages.of(config)
    with locked_run(run) as folder:
        folder.prepare(stages)
        job = open_job(stages.inputs, folder)
        fault = folder.find_fault(stages)
        fault = fault or folder.find_fault(_samples(job).values())
        if fault:
            raise RunError(f"{run} has not finished; run `gradsift select` with it again ({fault})")
        for fault in filter(None, (exhibits_fault(folder, part) for part in PARTS)):
            raise RunError(fault)
        return build_report(job, stages)


def refresh_report(job: Job, stages: RunStages) -> None:
    """Write `report.html` anew if the folder holds all stages as planned, or say what is missing.

    For what adds to a run: its picks are made by `select` alone.
    """
    fault = job.folder.find_fault(stages)
    if not fault:
        try:
            build_report(job, stages)
        except RunError as error:  # a shard, say: what this command is for is done
            fault = str(error)
    if fault:
        logger.warning("%s is as it was: %s; run `gradsift select` again", layout.REPORT, fault)


def build_report(job: Job, stages: RunStages) -> Path:
    """Write `report.html`, measuring first what only it needs, and return its path."""
    path = job.folder.path
    for name, stage in _samples(job).items():
        with job.folder.stage(stage) as todo:
            if todo:
                measure_sample(job, name, read_scores(path, "gist", name))
    pool, scores = candidates(job.pool, job.config.data.columns), scores_of(job)
    pages, selections = [], read_selections(job.folder)
    for name in job.targets:
        kept = [selection for selection in selections if selection.target == name]
        for policy in _policies(job, stages.selections[name], kept):
            own = stages.with_policy(policy)
            own_job = replace(job, inputs=own.inputs)
            pages.append(target_page(own_job, own, name, pool, scores[name], kept))
    write_atomically(
        path / layout.REPORT, render(overview(job, stages, selections), pages).encode()
    )
    logger.info("%s explains it", path / layout.REPORT)
    return path / layout.REPORT


def _policies(job: Job, stage: Stage, kept: Sequence[Selection]) -> list[PolicyConfig]:
    """Return the policies of a target's selections that are made from the scores of now.

    `stage`: that of the run's settings, whose policy comes first. `kept`: all of the target.
    """
    first = job.config.policy
    scored = {key: stage.inputs[key] for key in ("method", "scores", "version")}
    others = [
        selection.policy
        for selection in kept
        if selection.policy.name != first.name
        and job.folder.is_made_from(layout.selection(selection.key), stage.sources, scored)
    ]
    return [first, *others]


def _samples(job: Job) -> dict[str, Stage]:
    """Return the stages that measure a part of the pool in more directions than were kept.

    By target: those where more could have been kept.
    """
    if job.config.method != "gist":
        return {}
    names = (name for name in job.targets if can_compare_twice_the_rank(job, name))
    return {name: sampling_stage(job.inputs, name) for name in names}

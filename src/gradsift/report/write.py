"""The page that explains a selection: one HTML file that needs no network.

What was asked and what came out, where the picks come from, how sure the choice is, why each, what
the target looks like, and what `evaluate` and `geometry` found.
"""

from __future__ import annotations

import logging
from pathlib import Path

from gradsift.errors import RunError, system_faults_told
from gradsift.methods.job import Job, open_job
from gradsift.methods.registry import METHODS
from gradsift.report.exhibits import PARTS, exhibits_fault
from gradsift.report.overview import overview
from gradsift.report.page import render
from gradsift.report.target_page import target_page
from gradsift.runs.atomic import write_atomically
from gradsift.runs.opening import open_run, read_config
from gradsift.selection.picks import candidates
from gradsift.selection.score_table import read_scores
from gradsift.selection.stability import can_double, measure_sample, sampling_stage
from gradsift.selection.stages import Plan

logger = logging.getLogger(__name__)

FILE = "report.html"


@system_faults_told()
def write_report(run: str | Path) -> Path:
    """Write `report.html` anew from what a finished run holds, and return its path.

    Example:
        >>> gradsift.write_report("runs/gsm8k")                        # doctest: +SKIP
        PosixPath('runs/gsm8k/report.html')

    Raises:
        RunError: If the folder holds no finished run.
    """
    config = read_config(run)
    plan = Plan.of(config)
    with open_run(run) as folder:
        folder.prepare(plan)
        job = open_job(plan.inputs, folder)
        fault = folder.find_fault(plan)
        if not fault and _needs_sample(job):
            fault = folder.find_fault([sampling_stage(plan.scores)])
        if fault:
            raise RunError(f"{run} has not finished; run `gradsift select` with it again ({fault})")
        for fault in filter(None, (exhibits_fault(folder, part) for part in PARTS)):
            raise RunError(fault)
        return leave_report(job, plan)


def refresh_report(job: Job, plan: Plan) -> None:
    """Write `report.html` anew if the folder holds all stages as planned, or say what is missing.

    For what adds to a run: its picks are made by `select` alone.
    """
    fault = job.folder.find_fault(plan)
    if not fault:
        try:
            leave_report(job, plan)
        except RunError as error:  # a shard, say: what this command is for is done
            fault = str(error)
    if fault:
        logger.warning("report.html is as it was: %s; run `gradsift select` again", fault)


def leave_report(job: Job, plan: Plan) -> Path:
    """Write `report.html`, measuring first what only it needs, and return its path."""
    path = job.folder.path
    if _needs_sample(job):
        with job.folder.stage(sampling_stage(plan.scores)) as todo:
            if todo:
                scores = {name: read_scores(path, "gist", name) for name in job.targets}
                measure_sample(job, scores)
    pool = candidates(job)
    scored = METHODS[job.config.method].scores(job)
    pages = [target_page(job, plan, name, pool, scored[name]) for name in job.targets]
    write_atomically(path / FILE, render(overview(job, plan), pages).encode())
    logger.info("%s explains it", path / FILE)
    return path / FILE


def _needs_sample(job: Job) -> bool:
    """Return whether a part of the pool has to be measured in more directions than were kept."""
    return job.config.method == "gist" and any(can_double(job, name) for name in job.targets)

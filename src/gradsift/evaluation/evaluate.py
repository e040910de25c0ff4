"""Does it work for me? The same fine-tuning on what each method picks, against random picks.

Every fine-tuning is done once and kept (`fine_tunings.py`). `evaluate` decides which there have to
be and what follows from them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.data.encoded import EncodedSet
from gradsift.data.given import Data, keep_targets
from gradsift.data.groups import GroupEncoder
from gradsift.data.sets import encode_sets, encoding_stages
from gradsift.errors import translate_os_errors
from gradsift.evaluation.conclusions import Datamodeling, conclude
from gradsift.evaluation.config import EvaluationConfig, FineTuningConfig, check_evaluation
from gradsift.evaluation.doses import check_parts
from gradsift.evaluation.figures import exhibits
from gradsift.evaluation.fine_tunings import FineTuner, FineTuning, HeldOut
from gradsift.evaluation.grid import Contender, Grid, find_contenders, plan_grid
from gradsift.evaluation.lds import describe_precision, subset_fine_tunings
from gradsift.evaluation.predictions import predict, stages_for_held_out
from gradsift.evaluation.results import Evaluation
from gradsift.evaluation.unused import remove_unused
from gradsift.methods.job import Job
from gradsift.pipeline import check_budgets, encode
from gradsift.report.exhibits import write_exhibits
from gradsift.report.write import refresh_report
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.opening import local_folder, locked_run
from gradsift.sections import merge
from gradsift.selection.stages import RunStages

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


def evaluate(
    run: str | Path,
    *,
    tests: Mapping[str, Data],
    engine: Mapping[str, Any] | None = None,
    clean: bool = False,
    **settings: Any,
) -> Evaluation:
    """Compare the methods on a run's pool and targets, by fine-tuning on what each picks.

    `tests`: held-out examples by target. `engine`: settings of that section that differ from those
    of the run, such as `{"executor": "ray"}`. `clean`: remove what earlier evaluations left that
    this one does not use. Everything else is as in `EvaluationConfig`.

    Examples:
        >>> found = gradsift.evaluate(                           # doctest: +SKIP
        ...     "runs/gsm8k", tests={"gsm8k": "gsm8k_test.jsonl"},
        ...     methods=["gist", "rds"], fine_tuning={"steps": 200})
        >>> print(found.verdicts[0])                             # doctest: +SKIP
        gsm8k, 5%: ...

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    folder = local_folder(run, fetch=False) / layout.EVALUATION
    wanted = EvaluationConfig.build(merge({"tests": keep_targets(tests, folder)}, settings))
    return run_evaluation(run, wanted, engine, clean)


@translate_os_errors()
def run_evaluation(
    run: str | Path,
    settings: EvaluationConfig,
    engine: Mapping[str, Any] | None = None,
    clean: bool = False,
) -> Evaluation:
    """Run a whole evaluation; see `evaluate`. The same again goes on where it stopped.

    `clean`: remove what earlier evaluations left that this one does not use.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    config = check_evaluation(run, settings, engine)
    own = RunStages.of(config)
    contenders = find_contenders(own, settings)
    with locked_run(run) as folder:
        folder.prepare(own.inputs.data_stages.values())
        for contender in contenders:  # whatever cannot be done is said before anything is
            for stages in contender.stages:
                folder.prepare(stages.measured)
        job = encode(own, folder, strict=False)
        budgets = settings.budgets or (config.policy.budget,)
        for contender in contenders:  # a variant may have a policy of its own
            check_budgets(replace(job, inputs=contender.stages[0].inputs), budgets)
        check_budgets(job, budgets)
        check_parts(len(job.pool), budgets[0], settings.quantiles)
        tests = _encode_tests(job, settings)
        tuner = FineTuner(job, settings, tests)
        content = settings.to_yaml().encode()
        write_atomically(folder.path / layout.EVALUATION_CONFIG, content)
        subsets, asked = _plan_lds(job, settings, contenders, tests)
        grid = plan_grid(job, settings, contenders, [(t, b) for t in tests for b in budgets])
        _warn_of_unseen_examples(settings.fine_tuning, grid, subsets)
        _train_missing(job, tuner, grid, subsets, list(tests))
        lds = Datamodeling(subsets, predict(job, asked, tests, subsets)) if subsets else None
        found = conclude(folder.path, tuner, grid, lds)
        if clean:
            stages = [stages for own in contenders for stages in own.stages]
            tunings = [entry.tuning for entry in (*grid.entries, *grid.doses)]
            remove_unused(folder, tuner.paths([*tunings, *subsets]), [*stages, *asked.values()])
        selections = {name: stage.fingerprint for name, stage in own.selections.items()}
        write_exhibits(folder, layout.EVALUATION, exhibits(found), selections)
        refresh_report(replace(job, inputs=own.inputs), own)
        return found


def _encode_tests(job: Job, settings: EvaluationConfig) -> dict[str, HeldOut]:
    """Return the held-out examples of every target, encoded now or before."""
    from gradsift.models.loading import load_encoder

    config = job.config
    specs = {layout.test_set(name): sources for name, sources in settings.tests.items()}
    identity, trusted = job.inputs.model_identity, config.model.trust_remote_code
    stages = encoding_stages(config.data, identity, trusted, specs, layout.TESTS)
    load = partial(load_encoder, config.model, config.data, config.engine)
    encode_sets(specs, stages, job.folder, GroupEncoder(load, config.data.columns))
    result = {}
    for name, stage in zip(settings.tests, stages.values(), strict=True):
        examples = EncodedSet(job.path(layout.encoded(layout.test_set(name), layout.TESTS)))
        result[name] = HeldOut(examples, stage)
        for where, others in (("pool", job.pool), ("target", job.targets[name])):
            repeated = sum(_hashes(examples).isin(_hashes(others)))
            if repeated:
                message = "%d of %d held-out examples of %s are in the %s itself"
                logger.warning(message, repeated, len(examples), name, where)
    return result


def _hashes(encoded: EncodedSet) -> pd.Series:
    return encoded.table(["text_hash"])["text_hash"].to_pandas()


def _plan_lds(
    job: Job,
    settings: EvaluationConfig,
    contenders: Sequence[Contender],
    tests: Mapping[str, HeldOut],
) -> tuple[list[FineTuning], dict[str, RunStages]]:
    """Return the random subsets to train on, and the stages of each method that is to foretell."""
    if not settings.lds.measure:
        return [], {}
    subsets = subset_fine_tunings(len(job.pool), settings.lds, settings.fine_tuning)
    encoded = {name: test.stage for name, test in tests.items()}
    run = RunStages.of_inputs(job.inputs)
    found = {c.name: stages_for_held_out(c, run, encoded) for c in contenders}
    asked = {name: stages for name, stages in found.items() if stages is not None}
    for stages in asked.values():
        job.folder.prepare(stages.measured)
    fewest = min(len(test.examples) for test in tests.values())
    logger.info("%s", describe_precision(len(subsets), fewest))
    return subsets, asked


def _warn_of_unseen_examples(
    settings: FineTuningConfig, grid: Grid, subsets: Sequence[FineTuning]
) -> None:
    """Warn where a fine-tuning ends before it has seen all of its examples."""
    seen = settings.steps * settings.batch_size
    picked = [len(entry.tuning.rows) for entry in grid.entries if entry.method != "full"]
    for what, size in (
        ("picks", max(picked)),
        ("a subset", max((len(c.rows) for c in subsets), default=0)),
    ):
        if size > seen:
            logger.warning(
                "fine_tuning.steps × batch_size is %d examples, less than the %d of %s: not all of "
                "them are trained on",
                seen, size, what,
            )  # fmt: skip


def _train_missing(
    job: Job,
    tuner: FineTuner,
    grid: Grid,
    subsets: Sequence[FineTuning],
    targets: Sequence[str],
) -> None:
    """Train what is missing; selections that are the same are trained once."""
    todo: list[tuple[FineTuning, Sequence[str], bool]] = []
    for entries, with_tasks in ((grid.entries, True), (grid.doses, False)):
        wanted: dict[FineTuning, set[str]] = {}
        for entry in entries:
            wanted.setdefault(entry.tuning, set()).add(entry.target)
        todo += [(tuning, sorted(names), with_tasks) for tuning, names in wanted.items()]
    todo += [(tuning, targets, False) for tuning in subsets]
    missing = [item for item in todo if tuner.lacks(*item)]
    logger.info("%d of %d fine-tunings are there already", len(todo) - len(missing), len(todo))
    if missing:
        job.train(partial(tuner.run_all, missing), job.path(layout.FINE_TUNINGS))

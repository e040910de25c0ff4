"""Does it work for me? The same fine-tuning on what each method picks, against random picks.

Every fine-tuning is done once and kept (`fine_tunings.py`). `evaluate` decides which there have to
be and what follows from them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.config import Config
from gradsift.data.duplicates import dedup_columns
from gradsift.data.encoded import EncodedSet
from gradsift.data.sets import encode_sets, encoding_stages
from gradsift.errors import translate_os_errors
from gradsift.evaluation.conclusions import Entry, conclude
from gradsift.evaluation.config import EvaluationConfig, FineTuningConfig, check_evaluation
from gradsift.evaluation.figures import exhibits
from gradsift.evaluation.fine_tunings import FineTuner, FineTuning, HeldOut
from gradsift.evaluation.lds import subset_fine_tunings
from gradsift.evaluation.results import Evaluation
from gradsift.methods.job import Job
from gradsift.methods.registry import METHODS
from gradsift.pipeline import check_budgets, encode, measure
from gradsift.report.exhibits import write_exhibits
from gradsift.report.write import refresh_report
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.opening import open_run
from gradsift.scores.ranking import Ranking, Scores
from gradsift.sections import merge
from gradsift.selection.picks import candidates
from gradsift.selection.policies import pick
from gradsift.selection.score_table import read_scores
from gradsift.selection.stages import RunStages

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


def evaluate(
    run: str | Path,
    *,
    tests: Mapping[str, str | Sequence[str]],
    engine: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Evaluation:
    """Compare the methods on a run's pool and targets, by fine-tuning on what each picks.

    `tests`: held-out examples by target. `engine`: settings of that section that differ from those
    of the run, such as `{"executor": "ray"}`. Everything else is as in `EvaluationConfig`.

    Example:
        >>> found = gradsift.evaluate(                           # doctest: +SKIP
        ...     "runs/gsm8k", tests={"gsm8k": "gsm8k_test.jsonl"},
        ...     methods=["gist", "rds"], fine_tuning={"steps": 200})
        >>> print(found.markdown())                              # doctest: +SKIP

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    wanted = EvaluationConfig.build(merge({"tests": tests}, settings))
    return run_evaluation(run, wanted, engine)


@translate_os_errors()
def run_evaluation(
    run: str | Path, settings: EvaluationConfig, engine: Mapping[str, Any] | None = None
) -> Evaluation:
    """Run a whole evaluation; see `evaluate`. The same again goes on where it stopped.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    config = check_evaluation(run, settings, engine)
    by_method = _stages_by_method(config, settings)
    with open_run(run) as folder:
        for stages in by_method.values():  # whatever cannot be done is said before anything is
            folder.prepare([*stages.inputs.data_stages.values(), *stages.measured])
        job = encode(by_method["random"], folder, strict=False)
        budgets = settings.budgets or (config.policy.budget,)
        check_budgets(job, budgets)
        tests = _encode_tests(job, settings)
        tuner = FineTuner(job, settings, tests)
        content = settings.to_yaml().encode()
        write_atomically(folder.path / layout.EVALUATION_CONFIG, content)
        grid = _grid(job, settings, by_method, [(t, b) for t in tests for b in budgets])
        subsets = subset_fine_tunings(len(job.pool), settings.lds, settings.fine_tuning)
        _warn_of_unseen_examples(settings.fine_tuning, grid, subsets)
        _train_missing(job, tuner, grid, subsets, list(tests))
        scores = {
            (target, method): read_scores(folder.path, method, target)
            for target in tests
            for method in settings.methods
        }
        found = conclude(folder.path, tuner, grid, subsets, scores)
        own = RunStages.of(config)
        selections = {name: stage.fingerprint for name, stage in own.selections.items()}
        write_exhibits(folder, layout.EVALUATION, exhibits(found), selections)
        refresh_report(replace(job, inputs=own.inputs), own)
        return found


def _stages_by_method(config: Config, settings: EvaluationConfig) -> dict[str, RunStages]:
    """Return the stages of every method, `random` always among them.

    Raises:
        ModelError: If the model, an adapter or an encoder is not there.
    """
    methods = dict.fromkeys([*settings.methods, "random"])
    return {m: RunStages.of(config.model_copy(update={"method": m})) for m in methods}


def _encode_tests(job: Job, settings: EvaluationConfig) -> dict[str, HeldOut]:
    """Return the held-out examples of every target, encoded now or before."""
    from gradsift.models.loading import load_encoder

    config = job.config
    specs = {layout.test_set(name): sources for name, sources in settings.tests.items()}
    identity, trusted = job.inputs.model_identity, config.model.trust_remote_code
    stages = encoding_stages(config.data, identity, trusted, specs, layout.TESTS)
    load = partial(load_encoder, config.model, config.data)
    encode_sets(specs, stages, job.folder, load, config.data.columns)
    result = {}
    for name, stage in zip(settings.tests, stages.values(), strict=True):
        examples = EncodedSet(job.path(layout.encoded(layout.test_set(name), layout.TESTS)))
        result[name] = HeldOut(examples, stage.fingerprint)
        for where, others in (("pool", job.pool), ("target", job.targets[name])):
            repeated = sum(_hashes(examples).isin(_hashes(others)))
            if repeated:
                message = "%d of %d held-out examples of %s are in the %s itself"
                logger.warning(message, repeated, len(examples), name, where)
    return result


def _hashes(encoded: EncodedSet) -> pd.Series:
    return encoded.table(["text_hash"])["text_hash"].to_pandas()


def _grid(
    job: Job,
    settings: EvaluationConfig,
    by_method: Mapping[str, RunStages],
    places: Sequence[tuple[str, str]],
) -> list[Entry]:
    """Return base, random and every method's picks, by target and budget, for every seed.

    Methods are measured one after the other, and only their picks are kept.
    """
    steps, num_pool = settings.fine_tuning.steps, len(job.pool)
    tunings: dict[str, dict[tuple[str, str], list[FineTuning]]] = {"base": {}, "random": {}}
    for place in places:
        tunings["base"][place] = [FineTuning((), 0, 0, "base")]
    for seed in range(settings.random_seeds):
        section = job.config.random.model_copy(update={"seed": seed})
        config = job.config.model_copy(update={"random": section})
        seeded = replace(job, inputs=replace(job.inputs, config=config))
        for place, rows in _picks(job, METHODS["random"].scores(seeded), places):
            tuning = FineTuning(rows, steps, seed, f"random, {place[1]}, seed {seed}")
            tunings["random"].setdefault(place, []).append(tuning)
    if settings.full:
        from gradsift.models.training import steps_per_epoch

        whole = max(steps, steps_per_epoch(num_pool, settings.fine_tuning))
        rows = tuple(range(num_pool))
        trained = [
            FineTuning(rows, whole, seed, f"full, seed {seed}") for seed in range(settings.seeds)
        ]
        tunings["full"] = dict.fromkeys(places, trained)
    for method in settings.methods:
        scored = measure(replace(job, inputs=by_method[method].inputs), by_method[method])()
        if method == "random":
            continue
        tunings[method] = {
            place: [
                FineTuning(rows, steps, seed, f"{method} for {place[0]}, {place[1]}, seed {seed}")
                for seed in range(settings.seeds)
            ]
            for place, rows in _picks(job, scored, places)
        }
    return [
        Entry(*place, method, tuning)
        for place in places
        for method, by_place in tunings.items()
        for tuning in by_place[place]
    ]


def _picks(
    job: Job, scored: Mapping[str, Scores], places: Sequence[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], tuple[int, ...]]]:
    """Yield the rows that the run's policy picks for each target at each budget, in their order."""
    columns = job.config.data.columns
    pool = candidates(job.pool, columns)
    for target, budget in places:
        policy, scores = job.config.policy.model_copy(update={"budget": budget}), scored[target]
        if isinstance(scores, Ranking):  # it has no target examples to pick for in turn
            policy = policy.model_copy(update={"strategy": "top"})
        of_target = dedup_columns(job.targets[target], columns)
        rows = pick(scores.rankings(policy), pool, of_target, policy).rows
        yield (target, budget), tuple(sorted(rows))


def _warn_of_unseen_examples(
    settings: FineTuningConfig, grid: Sequence[Entry], subsets: Sequence[FineTuning]
) -> None:
    """Warn where a fine-tuning ends before it has seen all of its examples."""
    seen = settings.steps * settings.batch_size
    picked = [len(entry.tuning.rows) for entry in grid if entry.method not in ("base", "full")]
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
    grid: Sequence[Entry],
    subsets: Sequence[FineTuning],
    targets: Sequence[str],
) -> None:
    """Train what is missing; selections that are the same are trained once."""
    wanted: dict[FineTuning, set[str]] = {}
    for entry in grid:
        wanted.setdefault(entry.tuning, set()).add(entry.target)
    todo = [(tuning, sorted(names), True) for tuning, names in wanted.items()]
    todo += [(tuning, [*targets], False) for tuning in subsets]
    missing = [item for item in todo if tuner.lacks(*item)]
    logger.info("%d of %d fine-tunings are there already", len(todo) - len(missing), len(todo))
    if missing:
        job.train(partial(tuner.run_all, missing), job.path(layout.FINE_TUNINGS))

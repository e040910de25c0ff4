"""Does it work for me? The same fine-tuning on what each method picks, against random picks.

Every fine-tuning is a cell that is done once and kept; see `cells.py`. `evaluate` decides which
cells there have to be and what follows from them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gradsift.config import Config, merge
from gradsift.data import EncodedSet
from gradsift.errors import ConfigError
from gradsift.evaluation.cells import Bench, Cell, HeldOut
from gradsift.evaluation.conclusions import Entry, conclude
from gradsift.evaluation.lds import subset_cells
from gradsift.evaluation.results import Evaluation
from gradsift.evaluation.settings import EvaluationConfig
from gradsift.job import Job
from gradsift.methods import METHODS
from gradsift.pipeline import choose, encode, encode_sets, measure
from gradsift.progress import track
from gradsift.scores import Ranking, Scores
from gradsift.stages import Plan, encoding_stages
from gradsift.store import open_run, read_config, write_atomically
from gradsift.training import steps_per_epoch

logger = logging.getLogger(__name__)

__all__ = ["Evaluation", "EvaluationConfig", "evaluate", "run_evaluation"]

_FOLDER = "evaluation"


def evaluate(
    run: str | Path, *, tests: Mapping[str, str | Sequence[str]], **settings: Any
) -> Evaluation:
    """Compare the methods on a run's pool and targets, by fine-tuning on what each picks.

    `tests`: held-out examples by target. Everything else is as in `EvaluationConfig`.

    Example:
        >>> found = gradsift.evaluate(                           # doctest: +SKIP
        ...     "runs/gsm8k", tests={"gsm8k": "gsm8k_test.jsonl"},
        ...     methods=["gist", "rds"], fine_tuning={"steps": 200})
        >>> print(found.markdown())                              # doctest: +SKIP

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    return run_evaluation(run, EvaluationConfig.build(merge({"tests": dict(tests)}, settings)))


def run_evaluation(run: str | Path, settings: EvaluationConfig) -> Evaluation:
    """Run a whole evaluation; see `evaluate`. The same again goes on where it stopped.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    config = read_config(Path(run))
    _check(config, settings)
    with open_run(Path(run)) as folder:
        plan = Plan.of(config.model_copy(update={"method": "random"}))  # costs nothing to plan
        folder.prepare(plan.inputs.data.values())
        job = encode(plan, folder, strict=False)
        tests = _encode_tests(job, settings)
        content = settings.to_yaml().encode()
        write_atomically(folder.path / _FOLDER / "config.yaml", content)
        scored = {method: _scored(job, method) for method in settings.methods}
        grid = [*_grid(job, settings, scored, tests)]
        subsets = subset_cells(len(job.pool), settings.lds, settings.fine_tuning)
        bench = Bench(job, settings, tests)
        _run_cells(bench, grid, subsets, list(tests))
        scores = {
            (target, method): by_target[target].scores()[0]
            for target in tests
            for method, by_target in scored.items()
        }
        return conclude(folder.path / _FOLDER, bench, grid, subsets, scores)


def _check(config: Config, settings: EvaluationConfig) -> None:
    unknown = [name for name in settings.tests if name not in config.data.targets]
    if unknown:
        raise ConfigError(
            f"held-out examples for {unknown[0]!r}, which is no target of this run "
            f"({', '.join(config.data.targets)})"
        )
    if settings.lm_eval:
        from gradsift.evaluation.harness import check_tasks

        check_tasks(settings.lm_eval, settings.lm_eval_include)


def _encode_tests(job: Job, settings: EvaluationConfig) -> dict[str, HeldOut]:
    """Return the held-out examples of every target, encoded now or before."""
    specs = {f"test.{name}": sources for name, sources in settings.tests.items()}
    stages = encoding_stages(job.config, job.inputs.model, specs, f"{_FOLDER}/data")
    encode_sets(job.config, specs, stages, job.folder, job.path(f"{_FOLDER}/data"))
    result = {}
    known = {*job.pool.table(["text_hash"])["text_hash"].to_pylist()}
    for name, (encoded, stage) in zip(settings.tests, stages.items(), strict=True):
        examples = EncodedSet(job.path(f"{_FOLDER}/data/{encoded}.parquet"))
        result[name] = HeldOut(examples, stage.fingerprint)
        repeated = sum(h in known for h in examples.table(["text_hash"])["text_hash"].to_pylist())
        if repeated:
            told = (repeated, len(examples), name)
            logger.warning("%d of %d held-out examples of %s are in the pool itself", *told)
    return result


def _scored(job: Job, method: str) -> Mapping[str, Scores]:
    """Return a method's scores, measured now or before."""
    plan = Plan.of(job.config.model_copy(update={"method": method}))
    job.folder.prepare([*plan.measured, plan.scores])
    return measure(replace(job, inputs=plan.inputs), plan)()


def _grid(
    job: Job,
    settings: EvaluationConfig,
    scored: Mapping[str, Mapping[str, Scores]],
    tests: Mapping[str, HeldOut],
) -> Iterator[Entry]:
    """Yield base, random and every method's picks, for every target, budget and seed."""
    steps, num_pool = settings.fine_tuning.steps, len(job.pool)
    for target in tests:
        for budget in settings.budgets or (job.config.policy.budget,):
            entry = partial(Entry, target, budget)
            yield entry("base", Cell((), 0, 0, "base"))
            for seed in range(settings.random_seeds):
                config = job.config.model_copy(
                    update={"random": job.config.random.model_copy(update={"seed": seed})}
                )
                seeded = replace(job, inputs=replace(job.inputs, config=config))
                rows = _picks(job, target, budget, METHODS["random"].scores(seeded)[target])
                yield entry("random", Cell(rows, steps, seed, f"random, {budget}, seed {seed}"))
            if settings.full:
                whole = max(steps, steps_per_epoch(num_pool, settings.fine_tuning))
                for seed in range(settings.seeds):
                    cell = Cell(tuple(range(num_pool)), whole, seed, f"full, seed {seed}")
                    yield entry("full", cell)
            for method in settings.methods:
                if method != "random":
                    rows = _picks(job, target, budget, scored[method][target])
                    for seed in range(settings.seeds):
                        label = f"{method} for {target}, {budget}, seed {seed}"
                        yield entry(method, Cell(rows, steps, seed, label))


def _picks(job: Job, target: str, budget: str, scores: Scores) -> tuple[int, ...]:
    policy = job.config.policy.model_copy(update={"budget": budget})
    if isinstance(scores, Ranking):  # it has no target examples that could take turns
        policy = policy.model_copy(update={"strategy": "top"})
    return tuple(choose(job, target, scores.turns(policy), policy).rows)


def _run_cells(
    bench: Bench, grid: Sequence[Entry], subsets: Sequence[Cell], targets: Sequence[str]
) -> None:
    """Train what is missing; selections that are the same are trained once."""
    wanted: dict[Cell, set[str]] = {}
    for entry in grid:
        wanted.setdefault(entry.cell, set()).add(entry.target)
    todo = [(cell, names, True) for cell, names in wanted.items()]
    todo += [(cell, {*targets}, False) for cell in subsets]
    missing = [item for item in todo if bench.lacks(item[0], [*item[1]], item[2])]
    logger.info("%d of %d fine-tunings are there already", len(todo) - len(missing), len(todo))
    if missing:
        with track("fine-tunings", len(missing), "fine-tunings") as advance:
            for cell, names, with_tasks in missing:
                bench.run(cell, [*names], with_tasks)
                advance(1)

"""Which fine-tunings an evaluation needs: on nothing, at random, and on what each method picks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gradsift.config import Config
from gradsift.data.duplicates import dedup_columns
from gradsift.evaluation.conclusions import Dose, Entry, Grid
from gradsift.evaluation.config import EvaluationConfig
from gradsift.evaluation.costs import cost_of
from gradsift.evaluation.doses import plan_doses
from gradsift.evaluation.fine_tunings import FineTuning
from gradsift.evaluation.variants import configure_variant, with_other_seeds
from gradsift.methods.job import Job
from gradsift.methods.registry import METHODS
from gradsift.pipeline import measure
from gradsift.runs import layout
from gradsift.scores.ranking import Ranking, Scores
from gradsift.selection.picks import candidates
from gradsift.selection.policies import pick
from gradsift.selection.score_table import read_scores_in
from gradsift.selection.stages import RunStages

logger = logging.getLogger(__name__)

Place = tuple[str, str]
"""A target and a budget."""


@dataclass(frozen=True)
class Contender:
    """A method, or a variant of one, as its user named it; its stages at each warm-up seed.

    Where the seed of the warm-up changes nothing, there is one.
    """

    name: str
    stages: tuple[RunStages, ...]

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.stages[0].inputs.config.method


def find_contenders(run: RunStages, settings: EvaluationConfig) -> list[Contender]:
    """Return what is compared with random picks, in the order of the settings.

    `run`: the stages of the run as it is configured. What a variant or another warm-up seed does
    not change is shared with them.
    """
    found = []
    for name in settings.methods:
        variant = configure_variant(run.inputs.config, name)
        plain = _unchanged(run, variant)
        stages = {}
        for number in range(settings.warmup_seeds):
            config = with_other_seeds(variant, number) if number else variant
            own = plain.beside(replace(run.inputs, config=config), layout.MEASURED)
            stages.setdefault(own.scores.fingerprint, own)
        if name != "random":
            found.append(Contender(name, tuple(stages.values())))
    return found


def _unchanged(run: RunStages, variant: Config) -> RunStages:
    """Return the stages of the variant's method with the settings of the run.

    Where it fuses others, what is measured are their stages, whichever the run would fuse.
    """

    def stages_by(method: str) -> RunStages:
        config = run.inputs.config.model_copy(update={"method": method})
        return RunStages.of_inputs(replace(run.inputs, config=config))

    measured = [stage for name in variant.measuring for stage in stages_by(name).measured]
    return replace(stages_by(variant.method), measured=tuple(measured))


def plan_grid(
    job: Job, settings: EvaluationConfig, contenders: Sequence[Contender], places: Sequence[Place]
) -> Grid:
    """Measure what the contenders have not measured yet, and return what is to be trained.

    They are measured one after the other, and only picks, scores and costs are kept.

    Raises:
        ConfigError: If the budget does not fit into a part of the ranking.
    """
    entries = [*_baselines(job, settings, places)]
    doses: list[Dose] = []
    scores, costs = {}, {}
    targets = list(dict.fromkeys(target for target, _ in places))
    for contender in contenders:
        for number, stages in enumerate(contender.stages):
            if number or contender.name != contender.method:
                logger.info("%s%s", contender.name, f", seed {number}" if number else "")
            own = replace(job, inputs=stages.inputs)
            picks = _picks(own, measure(own, stages)(), places)
            seeds = range(number * settings.seeds, (number + 1) * settings.seeds)
            entries += [
                Entry(*place, contender.name, number, tuning)
                for place, rows in picks
                for tuning in _tunings(
                    rows,
                    settings.fine_tuning.steps,
                    seeds,
                    f"{contender.name} for {', '.join(place)}",
                )
            ]
        first = contender.stages[0]
        costs[contender.name] = cost_of(replace(job, inputs=first.inputs), first)
        path = job.folder.path / first.scores.outputs[0]
        for target in targets:
            values = scores[target, contender.name] = read_scores_in(path, target)
            picked = next(
                e for e in entries if (e.target, e.method) == (target, contender.name)
            )  # at the first budget
            place, size = (target, picked.budget), len(picked.tuning.rows)
            doses += plan_doses(job, place, contender.name, values, size, settings)
    entries.sort(key=lambda entry: places.index((entry.target, entry.budget)))
    doses.sort(key=lambda dose: targets.index(dose.target))
    by_target = sorted(scores, key=lambda key: targets.index(key[0]))
    return Grid(entries, doses, {key: scores[key] for key in by_target}, costs)


def _tunings(rows: tuple[int, ...], steps: int, seeds: range, name: str) -> list[FineTuning]:
    return [FineTuning(rows, steps, seed, f"{name}, seed {seed}") for seed in seeds]


def _baselines(job: Job, settings: EvaluationConfig, places: Sequence[Place]) -> Iterator[Entry]:
    """Yield nothing, picks at random and perhaps the whole pool, for each target and budget."""
    steps, num_pool = settings.fine_tuning.steps, len(job.pool)
    for place in places:
        yield Entry(*place, "base", 0, FineTuning((), 0, 0, "base"))
    for seed in range(settings.random_seeds):
        section = job.config.random.model_copy(update={"seed": seed})
        update = {"method": "random", "random": section}
        config = job.config.model_copy(update=update)
        seeded = replace(job, inputs=replace(job.inputs, config=config))
        for place, rows in _picks(seeded, METHODS["random"].scores(seeded), places):
            tuning = FineTuning(rows, steps, seed, f"random, {place[1]}, seed {seed}")
            yield Entry(*place, "random", seed, tuning)
    if settings.full:
        from gradsift.models.training import steps_per_epoch

        whole = max(steps, steps_per_epoch(num_pool, settings.fine_tuning))
        for tuning in _tunings(tuple(range(num_pool)), whole, range(settings.seeds), "full"):
            for place in places:
                yield Entry(*place, "full", 0, tuning)


def _picks(
    job: Job, scored: Mapping[str, Scores], places: Sequence[Place]
) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Yield the rows that the policy picks for each target at each budget, in their order."""
    columns = job.config.data.columns
    pool = candidates(job.pool, columns)
    for target, budget in places:
        policy, scores = job.config.policy.model_copy(update={"budget": budget}), scored[target]
        if isinstance(scores, Ranking):  # it has no target examples to pick for in turn
            policy = policy.model_copy(update={"strategy": "top"})
        of_target = dedup_columns(job.targets[target], columns)
        rows = pick(scores.rankings(policy), pool, of_target, policy).rows
        yield (target, budget), tuple(sorted(rows))

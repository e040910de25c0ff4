"""Fine-tunings on random draws from each part of a ranking, from the best-scored to the worst."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from gradsift.data.duplicates import dedup_columns
from gradsift.errors import ConfigError
from gradsift.evaluation.conclusions import Dose
from gradsift.evaluation.config import EvaluationConfig
from gradsift.evaluation.fine_tunings import FineTuning
from gradsift.methods.job import Job
from gradsift.selection.picks import candidates
from gradsift.selection.policies import pick
from gradsift.types import Budget


def check_parts(num_pool: int, budget: str, quantiles: int) -> None:
    """Find out before the work whether a part of a ranking holds as many examples as are picked.

    Of a budget in tokens it is found when the picks are made.

    Raises:
        ConfigError: If it does not.
    """
    wanted = Budget.parse(budget)
    if quantiles and wanted.unit != "tok":
        share = wanted.amount / 100 if wanted.unit == "%" else None
        _check_size(int(wanted.amount if share is None else share * num_pool), num_pool, quantiles)


def plan_doses(
    job: Job,
    place: tuple[str, str],
    name: str,
    values: Float[np.ndarray, " example"],
    size: int,
    settings: EvaluationConfig,
) -> Iterator[Dose]:
    """Yield a fine-tuning on a random draw of some size from each part of a method's ranking.

    `place`: target and budget. The policy refuses from a draw what it refuses from picks:
    duplicates, repeats of target examples, what is above a cap. Examples of equal score are put
    in a random order, so that the order of the pool does not count.

    Raises:
        ConfigError: If the parts are smaller than the draws.
    """
    quantiles, target = settings.quantiles, place[0]
    if not quantiles:
        return
    _check_size(size, len(values), quantiles)
    order = np.random.default_rng(0).permutation(len(values))
    order = order[np.argsort(-values[order], kind="stable")]
    for number, part in enumerate(np.array_split(order, quantiles), start=1):
        label = f"{name} for {target}, part {number} of {quantiles}"
        rows = _draw(job, target, part, size, seed=number)
        yield Dose(target, name, number, FineTuning(rows, settings.fine_tuning.steps, 0, label))


def _draw(
    job: Job, target: str, part: Int[np.ndarray, " row"], size: int, seed: int
) -> tuple[int, ...]:
    """Return rows of a part of the pool, drawn at random, that the policy does not refuse."""
    columns = job.config.data.columns
    ranking = np.full((len(job.pool), 1), -np.inf, np.float32)
    ranking[part, 0] = np.random.default_rng(seed).random(len(part), np.float32)
    policy = job.config.policy.model_copy(update={"budget": str(size), "strategy": "top"})
    of_target = dedup_columns(job.targets[target], columns)
    found = pick(ranking, candidates(job.pool, columns), of_target, policy)
    return tuple(sorted(found.rows))


def _check_size(size: int, num_pool: int, quantiles: int) -> None:
    if size > num_pool // quantiles:
        raise ConfigError(
            f"{size} examples are picked, but each of {quantiles} parts of a ranking of {num_pool} "
            f"has {num_pool // quantiles}: lower --quantiles or --budget"
        )

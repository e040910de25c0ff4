"""From trained fine-tunings to what they say: means, differences to random, verdicts, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from gradsift.evaluation.costs import Cost
from gradsift.evaluation.fine_tunings import FineTuner, FineTuning
from gradsift.evaluation.lds import (
    DatamodelingPair,
    LinearDatamodelingScore,
    linear_datamodeling_scores,
)
from gradsift.evaluation.overlap import Overlap, overlaps
from gradsift.evaluation.quantiles import DoseResponse, dose_response
from gradsift.evaluation.results import Evaluation
from gradsift.evaluation.statistics import (
    Comparison,
    Losses,
    Variance,
    compare_methods,
    compare_reference,
)
from gradsift.evaluation.verdicts import REFERENCES, Row, verdicts
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically

ScoresOf = Mapping[tuple[str, str], Float[np.ndarray, " example"]]
"""Scores of the whole pool, by target and method."""


@dataclass(frozen=True)
class Entry:
    """A fine-tuning of the grid, and what it stands for.

    `method`: as the user wrote it, `gist:norm_power=1` for a variant. `selection`: which of its
    picks, by the number of the warm-up seed; of `random`, of its own.
    """

    target: str
    budget: str
    method: str
    selection: int
    tuning: FineTuning


@dataclass(frozen=True)
class Dose:
    """A fine-tuning on a random draw from a part of a method's ranking; part 1 is scored best."""

    target: str
    method: str
    part: int
    tuning: FineTuning


@dataclass(frozen=True)
class Datamodeling:
    """What the linear datamodeling score is computed from.

    `predictions`: by target and method, for every held-out example.
    """

    subsets: Sequence[FineTuning]
    predictions: Mapping[tuple[str, str], Float[np.ndarray, "subset example"]]


def conclude(  # noqa: PLR0913, PLR0917
    run: Path,
    tuner: FineTuner,
    grid: Sequence[Entry],
    datamodeling: Datamodeling | None,
    doses: Sequence[Dose],
    costs: Mapping[str, Cost],
    scores: ScoresOf,
) -> Evaluation:
    """Return what the trained fine-tunings say; leave it in the run as Parquet and Markdown."""
    rows = _rows(grid, tuner, costs)
    lds, pairs = _datamodeling(tuner, datamodeling) if datamodeling else ([], [])
    found = Evaluation(
        run / layout.EVALUATION,
        rows,
        _overlaps(grid, scores),
        lds,
        pairs,
        _dose_responses(doses, grid, tuner),
        verdicts(rows),
    )
    tables = {"trainings": [_training(entry, tuner) for entry in grid]} | _tables(found)
    for name, table in tables.items():
        content = partial(pq.write_table, pa.Table.from_pylist(table))
        write_atomically(run / layout.evaluation_table(name), content)
    table = partial(pq.write_table, found.table())
    write_atomically(run / layout.evaluation_table("table"), table)
    write_atomically(run / layout.EVALUATION_REPORT, found.markdown().encode())
    return found


def _rows(grid: Sequence[Entry], tuner: FineTuner, costs: Mapping[str, Cost]) -> list[Row]:
    """Return what the trainings of each target, budget and method come to."""
    groups: dict[tuple[str, str], dict[str, list[Entry]]] = {}
    for entry in grid:
        place = groups.setdefault((entry.target, entry.budget), {})
        place.setdefault(entry.method, []).append(entry)
    rows = []
    for entries in groups.values():
        compared = _compare(entries, tuner)
        rows += [
            _row(own, tuner, compared.get(method), costs.get(method))
            for method, own in entries.items()
        ]
    return rows


def _compare(entries: Mapping[str, Sequence[Entry]], tuner: FineTuner) -> Mapping[str, Comparison]:
    """Return each method's difference to random, at one target and budget."""
    losses = {method: _losses(own, tuner) for method, own in entries.items()}
    at_random = losses.pop("random")
    [first, *_] = entries["random"]
    num_tokens = tuner.outcome(first.tuning, first.target).num_tokens
    references = {
        name: compare_reference(losses.pop(name), at_random, num_tokens)
        for name in REFERENCES
        if name in losses
    }
    return references | compare_methods(losses, at_random, num_tokens)


def _losses(entries: Sequence[Entry], tuner: FineTuner) -> Losses:
    by_selection: dict[int, list[Float[np.ndarray, " example"]]] = {}
    for entry in entries:
        found = tuner.outcome(entry.tuning, entry.target).losses.astype(np.float64)
        by_selection.setdefault(entry.selection, []).append(found)
    return np.stack([np.stack(own) for own in by_selection.values()])


def _row(
    entries: Sequence[Entry], tuner: FineTuner, compared: Comparison | None, cost: Cost | None
) -> Row:
    first = entries[0]
    found = [tuner.outcome(entry.tuning, entry.target) for entry in entries]
    losses, accuracies = [o.loss for o in found], [o.accuracy for o in found]
    return Row(
        target=first.target,
        budget=first.budget,
        method=first.method,
        num_picks=len(first.tuning.rows),
        steps=first.tuning.steps,
        selections=len({entry.selection for entry in entries}),
        seeds=len(entries),
        loss=float(np.mean(losses)),
        loss_std=_spread(losses),
        accuracy=float(np.mean(accuracies)),
        accuracy_std=_spread(accuracies),
        compared=compared,
        cost=cost,
        tasks=_mean_tasks([tuner.tasks(entry.tuning) for entry in entries]),
    )


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation over trainings, 0 for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _mean_tasks(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean of each metric of each lm-evaluation-harness task over the trainings."""
    values: dict[str, list[float]] = {}
    for tasks in found:
        for metrics in tasks.values():
            for metric, value in metrics.items():
                values.setdefault(metric, []).append(value)
    return {name: float(np.mean(own)) for name, own in values.items()}


def _datamodeling(
    tuner: FineTuner, given: Datamodeling
) -> tuple[list[LinearDatamodelingScore], list[DatamodelingPair]]:
    losses = {}
    for target in dict.fromkeys(target for target, _ in given.predictions):
        found = [tuner.outcome(subset, target).losses for subset in given.subsets]
        losses[target] = np.stack(found).astype(np.float64)
    return linear_datamodeling_scores(losses, given.predictions)


def _dose_responses(
    doses: Sequence[Dose], grid: Sequence[Entry], tuner: FineTuner
) -> list[DoseResponse]:
    """Return what each method's parts say; they are as large as the picks at the first budget."""
    groups: dict[tuple[str, str], dict[int, list[FineTuning]]] = {}
    for dose in doses:
        parts = groups.setdefault((dose.target, dose.method), {})
        parts.setdefault(dose.part, []).append(dose.tuning)
    found = []
    for (target, method), parts in groups.items():
        at_random = [
            tuner.outcome(entry.tuning, target).loss
            for entry in grid
            if (entry.target, entry.budget, entry.method) == (target, grid[0].budget, "random")
        ]
        noise = Variance(float(np.var(at_random, ddof=1)), len(at_random) - 1)
        outcomes = [[tuner.outcome(t, target) for t in parts[number]] for number in sorted(parts)]
        losses = [np.stack([o.losses for o in own]).astype(np.float64) for own in outcomes]
        num_tokens = outcomes[0][0].num_tokens
        found.append(dose_response((target, method), losses, num_tokens, noise))
    return found


def _training(entry: Entry, tuner: FineTuner) -> dict[str, object]:
    """Return one training as a row of `trainings.parquet`."""
    outcome, tuning = tuner.outcome(entry.tuning, entry.target), entry.tuning
    return {
        "target": entry.target,
        "budget": entry.budget,
        "method": entry.method,
        "selection": entry.selection,
        "seed": tuning.seed,
        "steps": tuning.steps,
        "num_picks": len(tuning.rows),
        "loss": outcome.loss,
        "accuracy": outcome.accuracy,
    }


def _tables(found: Evaluation) -> dict[str, list[dict[str, object]]]:
    """Return what was found beside the methods' rows, as rows of tables."""
    return {
        "overlap": [asdict(overlap) for overlap in found.overlaps],
        "lds": [
            {"target": s.target, "method": s.method, **asdict(s.correlation)} for s in found.lds
        ],
        "lds_pairs": [
            {"target": pair.target, "method": pair.method, "other": pair.other,
             **asdict(pair.found.difference), "p_value": pair.found.p_value}
            for pair in found.lds_pairs
        ],
        "doses": [
            {"target": dose.target, "method": dose.method, "part": part, "loss": loss,
             "error": dose.error, "trend": dose.trend.value, "trend_low": dose.trend.low,
             "trend_high": dose.trend.high}
            for dose in found.doses
            for part, loss in enumerate(dose.losses, start=1)
        ],
    }  # fmt: skip


def _overlaps(grid: Sequence[Entry], scores: ScoresOf) -> list[Overlap]:
    """Return how much any two methods' selections at the first budget share."""
    picks = {
        (entry.target, entry.method): entry.tuning.rows
        for entry in reversed(grid)  # the first seed stays
        if entry.budget == grid[0].budget and (entry.target, entry.method) in scores
    }
    return list(overlaps({key: picks[key] for key in scores if key in picks}, scores))

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

from gradsift.evaluation.fine_tunings import FineTuner, FineTuning
from gradsift.evaluation.lds import linear_datamodeling_scores
from gradsift.evaluation.overlap import Overlap, overlaps
from gradsift.evaluation.results import Evaluation, Row, verdicts
from gradsift.evaluation.statistics import paired_difference
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically

ScoresOf = Mapping[tuple[str, str], Float[np.ndarray, " example"]]
"""Scores of the whole pool, by target and method."""


@dataclass(frozen=True)
class Entry:
    """A fine-tuning of the grid, and what it stands for."""

    target: str
    budget: str
    method: str
    selection: int
    tuning: FineTuning


@dataclass(frozen=True)
class Dose:
    target: str
    method: str
    part: int
    tuning: FineTuning


@dataclass(frozen=True)
class Datamodeling:
    subsets: Sequence[FineTuning]
    predictions: Mapping[tuple[str, str], Float[np.ndarray, "subset example"]]


def conclude(
    run: Path,
    tuner: FineTuner,
    grid: Sequence[Entry],
    datamodeling: Datamodeling | None,
    doses: Sequence[Dose],
    costs: Mapping[str, object],
    scores: ScoresOf,
) -> Evaluation:
    """Return what the trained fine-tunings say; leave it in the run as Parquet and Markdown."""
    rows = _rows(grid, tuner)
    lds = []
    if datamodeling:
        subsets = datamodeling.subsets
        targets = dict.fromkeys(entry.target for entry in grid)
        losses = {name: [tuner.outcome(c, name).loss for c in subsets] for name in targets}
        lds = linear_datamodeling_scores(subsets, losses, scores)
    found = Evaluation(run / layout.EVALUATION, rows, _overlaps(grid, scores), lds, verdicts(rows))
    tables = {
        "trainings": pa.Table.from_pylist([_training(entry, tuner) for entry in grid]),
        "table": found.table(),
        "overlap": pa.Table.from_pylist([asdict(overlap) for overlap in found.overlaps]),
        "lds": pa.Table.from_pylist(
            [{"target": s.target, "method": s.method, **asdict(s.correlation)} for s in lds]
        ),
    }
    for name, table in tables.items():
        write_atomically(run / layout.evaluation_table(name), partial(pq.write_table, table))
    write_atomically(run / layout.EVALUATION_REPORT, found.markdown().encode())
    return found


def _rows(grid: Sequence[Entry], tuner: FineTuner) -> list[Row]:
    """Return what the trainings of each target, budget and method come to."""
    groups: dict[tuple[str, str, str], list[FineTuning]] = {}
    for entry in grid:
        groups.setdefault((entry.target, entry.budget, entry.method), []).append(entry.tuning)
    return [
        _row(key, tunings, groups[(*key[:2], "random")], tuner) for key, tunings in groups.items()
    ]


def _row(
    key: tuple[str, str, str],
    tunings: Sequence[FineTuning],
    at_random: Sequence[FineTuning],
    tuner: FineTuner,
) -> Row:
    target, budget, method = key
    found = [tuner.outcome(tuning, target) for tuning in tunings]
    difference = None
    if method != "random":
        others = [tuner.outcome(tuning, target).losses for tuning in at_random]
        difference = paired_difference([o.losses for o in found], others, found[0].num_tokens)
    losses, accuracies = [o.loss for o in found], [o.accuracy for o in found]
    return Row(
        target=target,
        budget=budget,
        method=method,
        num_picks=len(tunings[0].rows),
        steps=tunings[0].steps,
        seeds=len(tunings),
        loss=float(np.mean(losses)),
        loss_std=_spread(losses),
        accuracy=float(np.mean(accuracies)),
        accuracy_std=_spread(accuracies),
        difference=difference,
        tasks=_mean_tasks([tuner.tasks(tuning) for tuning in tunings]),
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


def _training(entry: Entry, tuner: FineTuner) -> dict[str, object]:
    """Return one training as a row of `trainings.parquet`."""
    outcome, tuning = tuner.outcome(entry.tuning, entry.target), entry.tuning
    return {
        "target": entry.target,
        "budget": entry.budget,
        "method": entry.method,
        "seed": tuning.seed,
        "steps": tuning.steps,
        "num_picks": len(tuning.rows),
        "loss": outcome.loss,
        "accuracy": outcome.accuracy,
    }


def _overlaps(grid: Sequence[Entry], scores: ScoresOf) -> list[Overlap]:
    """Return how much any two methods' selections at the first budget share."""
    picks = {
        (entry.target, entry.method): entry.tuning.rows
        for entry in reversed(grid)  # the first seed stays
        if entry.budget == grid[0].budget and (entry.target, entry.method) in scores
    }
    return list(overlaps({key: picks[key] for key in scores if key in picks}, scores))

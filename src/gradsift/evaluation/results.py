"""The results of an evaluation: all that was found, as a table and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from gradsift.evaluation.lds import DatamodelingPair, LinearDatamodelingScore
from gradsift.evaluation.overlap import Overlap
from gradsift.evaluation.quantiles import DoseResponse
from gradsift.evaluation.tables import (
    cost_table,
    datamodeling_sentence,
    datamodeling_table,
    dose_table,
    markdown,
    method_table,
    overlap_table,
)
from gradsift.evaluation.verdicts import Row

UNCORRECTED = (
    "Intervals are those of each difference by itself; the verdict counts how many methods were "
    "compared, so an interval that misses zero may still be no difference."
)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; the files lie in `path`.

    `rows`: one for each target, budget and method, losses in nats; `verdicts`: in words.

    Examples:
        >>> found = gradsift.evaluate(                           # doctest: +SKIP
        ...     "runs/gsm8k", tests={"gsm8k": "gsm8k_test.jsonl"},
        ...     methods=["gist", "rds"], fine_tuning={"steps": 200})
        >>> found.table().column_names[:3]                       # doctest: +SKIP
        ['target', 'budget', 'method']
        >>> print(found.markdown())                              # doctest: +SKIP
        - gsm8k, 5%: ...
    """

    path: Path
    rows: Sequence[Row]
    overlaps: Sequence[Overlap]
    lds: Sequence[LinearDatamodelingScore]
    lds_pairs: Sequence[DatamodelingPair]
    doses: Sequence[DoseResponse]
    verdicts: Sequence[str]

    @property
    def places(self) -> list[tuple[str, str]]:
        """The targets and budgets, in their order."""
        return list(dict.fromkeys((row.target, row.budget) for row in self.rows))

    def rows_at(self, target: str, budget: str) -> list[Row]:
        """Return the rows of a target at a budget."""
        return [row for row in self.rows if (row.target, row.budget) == (target, budget)]

    def table(self) -> pa.Table:
        """Return a row per target, budget and method."""
        return pa.Table.from_pylist([_flat(row) for row in self.rows])

    def markdown(self) -> str:
        """Return the verdicts and the tables as Markdown."""
        parts = ["\n".join(f"- {verdict}" for verdict in self.verdicts), UNCORRECTED]
        for place in self.places:
            own = self.rows_at(*place)
            parts += [f"## {', '.join(place)}", markdown(method_table(own))]
            if len(costs := cost_table(own)) > 1:
                parts += ["What measuring took, and what it gained", markdown(costs)]
        parts += _datamodeling(self)
        for target in dict.fromkeys(target for target, _ in self.places):
            parts += _of_target(self, target)
        return "\n\n".join(parts) + "\n"


def _datamodeling(found: Evaluation) -> list[str]:
    if not found.lds:
        return []
    parts = ["Linear datamodeling score [95 %]", markdown(datamodeling_table(found.lds))]
    for target in dict.fromkeys(score.target for score in found.lds):
        own = [pair for pair in found.lds_pairs if pair.target == target]
        if sentence := datamodeling_sentence(own):
            parts.append(f"- {target}: {sentence}")
    return parts


def _of_target(found: Evaluation, target: str) -> list[str]:
    parts = []
    if doses := [dose for dose in found.doses if dose.target == target]:
        parts.append(f"Dose and response for {target}: loss by part of the ranking, best first")
        parts += [markdown(dose_table(doses)), "\n".join(f"- {d.sentence}" for d in doses)]
    if own := [o for o in found.overlaps if o.target == o.other_target == target]:
        parts.append(f"Overlap for {target}: Jaccard of the picks / Spearman of the scores")
        parts.append(markdown(overlap_table(own)))
    return parts


def _flat(row: Row) -> dict[str, object]:
    names = ("target", "budget", "method", "num_picks", "steps", "selections", "seeds", "loss")
    names += ("loss_std", "accuracy", "accuracy_std", "verdict")
    flat: dict[str, object] = {name: getattr(row, name) for name in names}
    for part in ("value", "low", "high"):
        key = "difference" if part == "value" else f"difference_{part}"
        flat[key] = None if row.difference is None else getattr(row.difference, part)
    flat["p_value"] = None if row.compared is None else row.compared.p_value
    for part in ("seconds", "tokens", "flops"):
        flat[part] = None if row.cost is None else getattr(row.cost, part)
    return flat | {f"lm_eval/{name}": value for name, value in row.tasks.items()}

"""The results of an evaluation: a row per method, verdicts, and both as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from gradsift.evaluation.lds import LinearDatamodelingScore
from gradsift.evaluation.overlap import Overlap
from gradsift.evaluation.statistics import Interval


@dataclass(frozen=True)
class Row:
    """How one method does for one target at one budget.

    `loss` (nats per token) and `accuracy` (share of tokens) are means over the trainings, with
    their standard deviations; `difference` is that of the loss to random selection: below 0 is
    better. `tasks`: metrics of lm-evaluation-harness tasks, means over the trainings.
    """

    target: str
    budget: str
    method: str
    num_picks: int
    steps: int
    seeds: int
    loss: float
    loss_std: float
    accuracy: float
    accuracy_std: float
    difference: Interval | None
    tasks: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """Whether it beats random selection beyond the noise."""
        if self.difference is None:
            return ""
        if self.difference.high < 0:
            return "better"
        return "worse" if self.difference.low > 0 else "no difference"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; the files lie in `path`."""

    path: Path
    rows: Sequence[Row]
    overlaps: Sequence[Overlap]
    lds: Sequence[LinearDatamodelingScore]
    verdicts: Sequence[str]

    def table(self) -> pa.Table:
        """Return a row per target, budget and method."""
        return pa.Table.from_pylist([_flat(row) for row in self.rows])

    def markdown(self) -> str:
        """Return the tables and the verdicts as Markdown."""
        parts = ["\n".join(f"- {verdict}" for verdict in self.verdicts), _fine_tuning(self.rows)]
        if self.lds:
            parts.append(_lds(self.lds))
        if self.overlaps:
            parts.append(_overlap(self.overlaps))
        return "\n\n".join(parts) + "\n"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return a plain sentence per target and budget: which methods beat random.

    >>> row = Row("t", "5%", "gist", 9, 9, 2, 1.0, 0.1, 0.5, 0.1, Interval(-0.2, -0.3, -0.1), {})
    >>> verdicts([row])
    ['t, 5%: gist beats random.']
    """
    result = []
    for target, budget in dict.fromkeys((row.target, row.budget) for row in rows):
        own = [r for r in rows if (r.target, r.budget) == (target, budget) and r.difference]
        named = {v: [r.method for r in own if r.verdict == v] for v in ("better", "worse")}
        beaten = [m for m in named["better"] if m != "base"]
        worse = [m for m in named["worse"] if m != "base"]
        sentence = f"{_listed(beaten)} beat{'s' * (len(beaten) == 1)} random"
        if not beaten:
            sentence = "nothing beats random beyond the noise"
        if worse:
            sentence += f"; {_listed(worse)} {'is' if len(worse) == 1 else 'are'} worse"
        if "base" in named["better"]:
            sentence += "; not fine-tuning at all is better than random"
        result.append(f"{target}, {budget}: {sentence}.")
    return result


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), *names[-1:]]) if len(names) > 1 else "".join(names)


def _flat(row: Row) -> dict[str, object]:
    names = ("target", "budget", "method", "num_picks", "steps", "seeds", "loss", "loss_std")
    names += ("accuracy", "accuracy_std", "verdict")
    flat: dict[str, object] = {name: getattr(row, name) for name in names}
    for part in ("value", "low", "high"):
        key = "difference" if part == "value" else f"difference_{part}"
        flat[key] = None if row.difference is None else getattr(row.difference, part)
    return flat | {f"lm_eval/{name}": value for name, value in row.tasks.items()}


def _fine_tuning(rows: Sequence[Row]) -> str:
    tasks = sorted({name for row in rows for name in row.tasks})
    titles = ["target", "budget", "method", "picks", "trainings", "held-out loss", "accuracy"]
    titles += ["difference to random [95 %]", "", *tasks]
    lines = []
    for row in rows:
        gap = "" if row.difference is None else interval(row.difference)
        cells = [row.target, row.budget, row.method, f"{row.num_picks:,}", str(row.seeds)]
        cells += [plus_minus(row.loss, row.loss_std), plus_minus(row.accuracy, row.accuracy_std)]
        cells += [gap, row.verdict]
        lines.append([*cells, *(f"{row.tasks[t]:.4f}" if t in row.tasks else "" for t in tasks)])
    return _markdown(titles, lines)


def _lds(scores: Sequence[LinearDatamodelingScore]) -> str:
    targets = list(dict.fromkeys(score.target for score in scores))
    methods = list(dict.fromkeys(score.method for score in scores))
    found = {(score.method, score.target): interval(score.correlation, 2) for score in scores}
    lines = [[method, *(found[method, target] for target in targets)] for method in methods]
    return "Linear datamodeling score [95 %]\n\n" + _markdown(["method", *targets], lines)


def _overlap(overlaps: Sequence[Overlap]) -> str:
    """Return Jaccard / rank agreement of every two methods, a table per target."""
    parts = []
    for target in dict.fromkeys(overlap.target for overlap in overlaps):
        own = [o for o in overlaps if o.target == o.other_target == target]
        methods = list(dict.fromkeys(m for o in own for m in (o.method, o.other_method)))
        found = {(o.method, o.other_method): f"{o.jaccard:.2f} / {o.agreement:+.2f}" for o in own}
        lines = [
            [one, *[""] * number, *(found[one, other] for other in methods[number + 1 :])]
            for number, one in enumerate(methods[:-1])
        ]
        title = f"Overlap for {target}: Jaccard of the picks / Spearman of the scores"
        if lines:
            parts.append(f"{title}\n\n{_markdown(['', *methods[1:]], lines)}")
    return "\n\n".join(parts)


def plus_minus(mean: float, std: float) -> str:
    """Return a mean and its standard deviation as text, the mean alone where there is none.

    >>> plus_minus(2.5, 0.125)
    '2.5000 ± 0.1250'
    """
    return f"{mean:.4f}" + (f" ± {std:.4f}" if std else "")


def interval(found: Interval, digits: int = 4) -> str:
    """Return an estimate and its interval as text.

    >>> interval(Interval(-0.21, -0.3, -0.1), 2)
    '-0.21 [-0.30, -0.10]'
    """
    value, low, high = (f"{x:+.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

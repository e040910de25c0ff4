"""The tables of an evaluation as text: the same for Markdown, the report and the terminal.

A table is a list of rows, its heads first.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradsift.evaluation.costs import Cost
from gradsift.evaluation.lds import DatamodelingPair, LinearDatamodelingScore
from gradsift.evaluation.overlap import Overlap
from gradsift.evaluation.quantiles import DoseResponse
from gradsift.evaluation.statistics import Interval
from gradsift.evaluation.verdicts import Row

TextTable = list[list[str]]
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def method_table(rows: Sequence[Row]) -> TextTable:
    """Return how each method did on a target within a budget."""
    tasks = sorted({name for row in rows for name in row.tasks})
    heads = ["method", "picks", "selections × trainings", "held-out loss", "accuracy"]
    heads += ["loss less random's [95 %]", "verdict", *tasks]
    table = [heads]
    for row in rows:
        trainings = f"{row.selections} × {row.seeds // row.selections}"
        cells = [row.method, f"{row.num_picks:,}", trainings]
        cells += [plus_minus(row.loss, row.loss_std), f"{row.accuracy:.1%}"]
        cells += ["" if row.difference is None else interval(row.difference), row.verdict]
        table.append([*cells, *(f"{row.tasks[t]:.4f}" if t in row.tasks else "" for t in tasks)])
    return table


def cost_table(rows: Sequence[Row]) -> TextTable:
    """Return what each method's measuring took, beside what it gained over random picks."""
    table = [["method", "time", "tokens", "operations", "gain over random's loss [95 %]"]]
    for row in rows:
        if row.cost is not None and row.difference is not None:
            table.append([row.method, *describe_cost(row.cost), interval(gain(row.difference))])
    return table


def datamodeling_table(scores: Sequence[LinearDatamodelingScore]) -> TextTable:
    """Return the linear datamodeling score of each method, a column for each target."""
    targets = list(dict.fromkeys(score.target for score in scores))
    methods = list(dict.fromkeys(score.method for score in scores))
    found = {(score.method, score.target): interval(score.correlation, 2) for score in scores}
    lines = [[method, *(found.get((method, t), "") for t in targets)] for method in methods]
    return [["method", *targets], *lines]


def datamodeling_sentence(pairs: Sequence[DatamodelingPair]) -> str:
    """Return which methods foretell a target's losses better than which others.

    >>> datamodeling_sentence([])
    ''
    """
    above: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.found.certain:
            names = [pair.method, pair.other]
            winner, loser = names if pair.found.difference.value > 0 else names[::-1]
            above.setdefault(winner, []).append(loser)
    if not pairs:
        return ""
    said = "; ".join(f"{winner} above {', '.join(losers)}" for winner, losers in above.items())
    return f"{said or 'no two methods differ'} (corrected for {len(pairs)} comparisons)."


def dose_table(doses: Sequence[DoseResponse]) -> TextTable:
    """Return the loss after training on each part of each method's ranking, and the trend."""
    count = max(len(dose.losses) for dose in doses)
    heads = ["method", *(f"part {number}" for number in range(1, count + 1)), "trend [95 %]"]
    return [
        heads,
        *(
            [dose.method, *(f"{loss:.4f}" for loss in dose.losses), interval(dose.trend, 2)]
            for dose in doses
        ),
    ]


def overlap_table(overlaps: Sequence[Overlap]) -> TextTable:
    """Return Jaccard / rank agreement of every two methods of a target."""
    methods = list(dict.fromkeys(m for o in overlaps for m in (o.method, o.other_method)))
    found = {(o.method, o.other_method): f"{o.jaccard:.2f} / {o.agreement:+.2f}" for o in overlaps}
    lines = [
        [one, *[""] * number, *(found[one, other] for other in methods[number + 1 :])]
        for number, one in enumerate(methods[:-1])
    ]
    return [["", *methods[1:]], *lines]


def gain(difference: Interval) -> Interval:
    """Return random's loss less the method's: above 0 is better."""
    return Interval(-difference.value, -difference.high, -difference.low)


def describe_cost(cost: Cost) -> list[str]:
    """Return time, tokens and floating-point operations for people.

    >>> describe_cost(Cost(72.0, 3_400_000, 5.6e15))
    ['1.2 min', '3.4 Mtok', '5.6 PFLOP']
    """
    return [_time(cost.seconds), amount(cost.tokens, "tok"), amount(cost.flops, "FLOP")]


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def amount(number: int | float, unit: str) -> str:
    """Return a number with the prefix of its size.

    >>> amount(1e12, "FLOP"), amount(0, "tok")
    ('1 TFLOP', 'none')
    """
    if not number:
        return "none"
    power = 0
    while number >= 1000 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_PREFIXES[power]}{unit}"


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


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

"""What an evaluation has for the report: figures and tables of each target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradsift.evaluation.results import Evaluation, Row, interval, plus_minus
from gradsift.report.exhibits import Exhibit, plotly_json
from gradsift.report.figures import MUTED, PICKS, POOL

_HEIGHT = 360


def exhibits(found: Evaluation) -> dict[str, list[Exhibit]]:
    """Return loss by method, linear datamodeling scores and overlaps, by target."""
    return {
        target: [
            *(_losses(found, target, budget) for budget in _budgets(found, target)),
            *_datamodeling(found, target),
            *_overlaps(found, target),
        ]
        for target in dict.fromkeys(row.target for row in found.rows)
    }


def _budgets(found: Evaluation, target: str) -> list[str]:
    return list(dict.fromkeys(row.budget for row in found.rows if row.target == target))


def _losses(found: Evaluation, target: str, budget: str) -> Exhibit:
    rows = [row for row in found.rows if (row.target, row.budget) == (target, budget)]
    tasks = sorted({name for row in rows for name in row.tasks})
    heads = ["method", "picks", "trainings", "held-out loss", "accuracy"]
    heads += ["loss less random's [95 %]", "verdict", *tasks]
    table = [heads]
    for row in rows:
        cells = [row.method, f"{row.num_picks:,}", str(row.seeds)]
        cells += [plus_minus(row.loss, row.loss_std), f"{row.accuracy:.1%}"]
        cells += ["" if row.difference is None else interval(row.difference, 3), row.verdict]
        table.append([*cells, *(f"{row.tasks[t]:.4f}" if t in row.tasks else "" for t in tasks)])
    [verdict] = [v for v in found.verdicts if v.startswith(f"{target}, {budget}: ")]
    text = (
        f"{verdict} The same fine-tuning on what each method picks: loss on held-out examples in "
        "nats per token, lower is better; bars are standard deviations over the trainings, the "
        "dotted line is random selection."
    )
    in_short = f"At {budget}, {verdict.removeprefix(f'{target}, {budget}: ')}"
    return Exhibit(f"Does it help? ({budget})", text, _figure(rows), table, in_short)


def _figure(rows: Sequence[Row]) -> dict[str, Any]:
    """Points with error bars, a method each, and a line at random selection."""
    from plotly import graph_objects as go

    own = [PICKS if row.method not in ("base", "random", "full") else POOL for row in rows]
    spread = [row.loss_std if row.seeds > 1 else 0.0 for row in rows]
    points = go.Scatter(
        x=[row.method for row in rows],
        y=[row.loss for row in rows],
        error_y={"type": "data", "array": spread, "color": MUTED, "thickness": 1.2, "width": 4},
        mode="markers",
        marker={"size": 10, "color": own},
    )
    figure = go.Figure(points)
    for row in rows:
        if row.method == "random":
            figure.add_hline(row.loss, line={"dash": "dot", "width": 1, "color": MUTED})
    figure.update_yaxes(title="held-out loss, nats per token")
    figure.update_xaxes(title="fine-tuned on the picks of", type="category")
    figure.update_layout(height=_HEIGHT)
    return plotly_json(figure)


def _datamodeling(found: Evaluation, target: str) -> list[Exhibit]:
    rows = [[s.method, interval(s.correlation, 2)] for s in found.lds if s.target == target]
    if not rows:
        return []
    text = (
        "Rank correlation, over fine-tunings on random subsets of the pool, between the sum of a "
        "method's scores and the loss that came out: 1 foretells it, 0 says nothing."
    )
    table = [["method", "correlation [95 %]"], *rows]
    return [Exhibit("Linear datamodeling score", text, table=table)]


def _overlaps(found: Evaluation, target: str) -> list[Exhibit]:
    rows = [
        [o.method, o.other_method, f"{o.jaccard:.2f}", f"{o.agreement:+.2f}"]
        for o in found.overlaps
        if o.target == o.other_target == target
    ]
    if not rows:
        return []
    text = "How much two methods' picks share (Jaccard), and how alike they rank the pool."
    table = [["method", "and", "Jaccard of the picks", "Spearman of the scores"], *rows]
    return [Exhibit("Overlap of the methods", text, table=table)]

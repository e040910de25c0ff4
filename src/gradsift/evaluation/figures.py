"""What an evaluation has for the report: figures and tables of each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.evaluation.quantiles import DoseResponse
from gradsift.evaluation.results import UNCORRECTED, Evaluation
from gradsift.evaluation.statistics import Interval
from gradsift.evaluation.tables import (
    amount,
    cost_table,
    datamodeling_sentence,
    datamodeling_table,
    dose_table,
    gain,
    method_table,
)
from gradsift.evaluation.verdicts import Row
from gradsift.report.exhibits import Exhibit, plotly_json
from gradsift.report.figures import MUTED, PICKS, POOL

if TYPE_CHECKING:
    from plotly import graph_objects as go

_HEIGHT = 360
_LINES = [(colour, dash) for dash in ("solid", "dash", "dot") for colour in (PICKS, POOL, MUTED)]
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
_APART = 0.05  # of a part's width, so that error bars lie beside each other


def exhibits(found: Evaluation) -> dict[str, list[Exhibit]]:
    """Return loss by method, cost, dose and response, datamodeling scores, overlaps, by target."""
    return {
        target: [
            *(_losses(found, *place) for place in found.places if place[0] == target),
            *_costs(found, target),
            *_doses(found, target),
            *_datamodeling(found, target),
            *_overlaps(found, target),
        ]
        for target in dict.fromkeys(target for target, _ in found.places)
    }


def _losses(found: Evaluation, target: str, budget: str) -> Exhibit:
    rows = found.rows_at(target, budget)
    [verdict] = [v for v in found.verdicts if v.startswith(f"{target}, {budget}: ")]
    text = (
        f"{verdict} The same fine-tuning on what each method picks: loss on held-out examples in "
        "nats per token, lower is better; bars are standard deviations over the trainings, the "
        f"dotted line is random selection. {UNCORRECTED}"
    )
    in_short = f"At {budget}, {verdict.removeprefix(f'{target}, {budget}: ')}"
    title = f"Does it help? ({budget})"
    return Exhibit(title, text, _loss_figure(rows), method_table(rows), in_short)


def _loss_figure(rows: Sequence[Row]) -> dict[str, Any]:
    """Points with error bars, a method each, and a line at random selection."""
    figure = _points(
        [row.method for row in rows],
        [row.loss for row in rows],
        {"array": [row.loss_std for row in rows]},
        [PICKS if row.is_method else POOL for row in rows],
    )
    _line_at_random(figure, rows)
    figure.update_yaxes(title="held-out loss, nats per token")
    figure.update_xaxes(title="fine-tuned on the picks of", type="category")
    return plotly_json(figure)


def _points(
    x: Sequence[Any], y: Sequence[float], bars: Mapping[str, Any], colours: Any
) -> go.Figure:
    from plotly import graph_objects as go

    error = {"type": "data", "color": MUTED, "thickness": 1.2, "width": 4, **bars}
    points = go.Scatter(x=x, y=y, error_y=error, mode="markers")
    points.marker = {"size": 10, "color": colours}
    figure = go.Figure(points)
    figure.update_layout(height=_HEIGHT)
    return figure


def _bars(intervals: Sequence[Interval]) -> dict[str, Any]:
    """Return the two halves of intervals, as error bars."""
    return {
        "symmetric": False,
        "array": [i.high - i.value for i in intervals],
        "arrayminus": [i.value - i.low for i in intervals],
    }


def _line_at_random(figure: go.Figure, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.method == "random":
            figure.add_hline(row.loss, line={"dash": "dot", "width": 1, "color": MUTED})


def _costs(found: Evaluation, target: str) -> list[Exhibit]:
    """Return gain against cost, at the first budget."""
    budget = next(budget for name, budget in found.places if name == target)
    rows = [r for r in found.rows_at(target, budget) if r.cost and r.difference and r.is_method]
    if not rows:
        return []
    text = (
        f"What a method gains at {budget} (random's loss less its own, with the 95 % interval; "
        "above the dotted line is better) against the floating-point operations that measuring it "
        "takes, on a logarithmic axis; those that take none of the base model stand on the left."
    )
    return [Exhibit("What it cost", text, _cost_figure(rows), cost_table(rows))]


def _cost_figure(rows: Sequence[Row]) -> dict[str, Any]:
    flops = [row.cost.flops if row.cost else 0.0 for row in rows]
    powers = [float(np.log10(f)) for f in flops if f > 0] or [1.0]
    none = np.floor(min(powers)) - 1
    gains = [gain(row.difference) for row in rows if row.difference]
    places = [float(np.log10(f)) if f > 0 else float(none) for f in flops]
    figure = _points(places, [g.value for g in gains], _bars(gains), PICKS)
    figure.update_traces(
        mode="markers+text", text=[row.method for row in rows], textposition="middle right"
    )
    ticks = np.arange(none + 1, np.ceil(max(powers)) + 1)
    labels = [amount(float(10.0**power), "FLOP") for power in ticks]
    if 0 in flops:
        ticks, labels = np.append(none, ticks), ["none", *labels]
    figure.update_xaxes(
        title="floating-point operations (logarithmic)", tickvals=ticks.tolist(), ticktext=labels
    )
    figure.update_yaxes(title="gain, nats per token")
    figure.add_hline(0, line={"dash": "dot", "width": 1, "color": MUTED})
    return plotly_json(figure)


def _doses(found: Evaluation, target: str) -> list[Exhibit]:
    own = [dose for dose in found.doses if dose.target == target]
    if not own:
        return []
    said: dict[str, list[str]] = {}
    for dose in own:
        said.setdefault(dose.said, []).append(dose.method)
    text = (
        "Fine-tunings on random draws from each part of a method's ranking, the best-scored first: "
        "where scores mean something from top to bottom, the loss rises from left to right. Bars "
        "are standard errors from the spread of random selections, the dotted line is random "
        "selection. "
        + "; ".join(f"{', '.join(methods)}: {what}" for what, methods in said.items())
        + "."
    )
    budget = next(budget for name, budget in found.places if name == target)
    figure = _dose_figure(own, found.rows_at(target, budget))
    return [Exhibit("Dose and response", text, figure, dose_table(own))]


def _dose_figure(doses: Sequence[DoseResponse], rows: Sequence[Row]) -> dict[str, Any]:
    """Draw loss against part, a line for each method, and a line at random selection."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for number, dose in enumerate(doses):
        colour, dash = _LINES[number % len(_LINES)]
        shift = (number - (len(doses) - 1) / 2) * _APART
        figure.add_scatter(
            x=[part + shift for part in range(1, len(dose.losses) + 1)],
            y=dose.losses,
            name=dose.method,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 1.6},
            marker={"size": 8, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
            error_y={"array": [dose.error] * len(dose.losses), "thickness": 1, "width": 3},
        )
    _line_at_random(figure, rows)
    count = max(len(dose.losses) for dose in doses)
    labels = ["1 (best)", *map(str, range(2, count)), f"{count} (worst)"]
    figure.update_xaxes(
        title="part of the ranking", tickvals=[*range(1, count + 1)], ticktext=labels
    )
    figure.update_yaxes(title="held-out loss, nats per token")
    figure.update_layout(height=_HEIGHT + 80, showlegend=True)
    return plotly_json(figure)


def _datamodeling(found: Evaluation, target: str) -> list[Exhibit]:
    own = [score for score in found.lds if score.target == target]
    if not own:
        return []
    sentence = datamodeling_sentence([p for p in found.lds_pairs if p.target == target])
    text = (
        "Rank correlation, over fine-tunings on random subsets of the pool, between the sum of a "
        "method's scores for a held-out example and the loss of that example that came out, "
        "averaged over the examples: 1 foretells it, 0 says nothing. Bars are 95 % intervals. "
        f"{sentence}"
    )
    values = [score.correlation for score in own]
    figure = _points([s.method for s in own], [v.value for v in values], _bars(values), PICKS)
    figure.add_hline(0, line={"dash": "dot", "width": 1, "color": MUTED})
    figure.update_yaxes(title="linear datamodeling score")
    figure.update_xaxes(type="category")
    table = datamodeling_table(own)
    return [Exhibit("Linear datamodeling score", text.strip(), plotly_json(figure), table)]


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

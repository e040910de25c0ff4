"""The plot of an evaluation: held-out loss by method with error bars, a panel per target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradsift.evaluation.results import Row
from gradsift.store import write_atomically

_PANEL_WIDTH, _HEIGHT = 420, 460


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Write one HTML file that needs no network: mean and standard deviation over the trainings."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    targets = list(dict.fromkeys(row.target for row in rows))
    budgets = list(dict.fromkeys(row.budget for row in rows))
    figure = make_subplots(cols=len(targets), subplot_titles=targets)
    for column, target in enumerate(targets, start=1):
        for budget in budgets:
            own = [row for row in rows if (row.target, row.budget) == (target, budget)]
            spread = [row.loss_std if row.seeds > 1 else 0.0 for row in own]
            points = graph_objects.Scatter(
                x=[row.method for row in own],
                y=[row.loss for row in own],
                error_y={"type": "data", "array": spread},
                mode="markers",
                name=budget,
                showlegend=column == 1 and len(budgets) > 1,
            )
            figure.add_trace(points, row=1, col=column)
            at_random = [row.loss for row in own if row.method == "random"]
            if at_random and len(budgets) == 1:
                figure.add_hline(at_random[0], line_dash="dot", row=1, col=column)  # type: ignore[arg-type]
    figure.update_yaxes(title_text="held-out loss, nats per token", col=1)
    figure.update_layout(width=max(600, _PANEL_WIDTH * len(targets)), height=_HEIGHT)
    page = figure.to_html(include_plotlyjs=True, full_html=True, div_id="evaluation")
    write_atomically(path, page.encode())

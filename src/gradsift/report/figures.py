"""The figures of the report, as Plotly's JSON; what is counted is counted before it is drawn.

Colours are names of the page's own (`page.css`): the page puts in what they are, light or dark.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from gradsift.report.exhibits import plotly_json
from gradsift.report.target_page import Edge, Histogram

PICKS = "var(--picks)"
POOL = "var(--pool)"
MUTED = "var(--muted)"
_TEXT, _BAND = "var(--text)", "var(--band)"
SEQUENTIAL = ((0.0, "var(--surface)"), (1.0, PICKS))
SIGNED = ((0.0, "var(--caution)"), (0.5, "var(--surface)"), (1.0, PICKS))
_HEIGHT = 320
_FEWEST_TICKS = 4


def _histogram(found: Histogram, title: str, log: bool = False) -> go.Figure:
    """Bars: shares of pool and picks, one over the other."""
    edges = np.log10(found.edges) if log else found.edges
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    labels = [f"{a:,.4g} to {b:,.4g}" for a, b in zip(found.edges, found.edges[1:], strict=False)]
    figure = go.Figure(
        [
            go.Bar(
                x=middles, y=values, width=widths, name=name, customdata=labels,
                marker={"color": colour, "line": {"width": 0}}, opacity=opacity,
                hovertemplate="%{customdata}: %{y:.2%}",
            )
            for name, values, colour, opacity in (
                ("pool", found.pool, POOL, 0.85), ("picks", found.picks, PICKS, 0.8),
            )
        ]
    )  # fmt: skip
    figure.update_layout(
        barmode="overlay", bargap=0, xaxis={"title": title}, height=_HEIGHT,
        yaxis={"tickformat": ".0%", "title": "share of the examples", "nticks": 5},
    )  # fmt: skip
    if log:
        ticks = log_ticks(float(found.edges[0]), float(found.edges[-1]))
        figure.update_xaxes(tickvals=np.log10(ticks), ticktext=[f"{t:,.0f}" for t in ticks])
    return figure


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis: a few even where it spans little.

    >>> log_ticks(40.0, 1024.0), log_ticks(52.0, 58.0)
    ([50.0, 100.0, 200.0, 500.0, 1000.0], [52.0, 53.0, 54.0, 55.0, 56.0, 57.0, 58.0])
    """
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [step * 10.0**power for power in range(-1, 9) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= _FEWEST_TICKS:
            return ticks
    return sorted({float(round(tick)) for tick in np.linspace(low, high, 7).tolist()})


def lengths(found: Histogram) -> dict[str, Any]:
    """Bars: tokens per example, on a logarithmic axis."""
    return plotly_json(_histogram(found, "tokens per example (logarithmic)", log=True))


def scores(found: Histogram, edge: Edge | None, unit: str) -> dict[str, Any]:
    """Bars: scores, the lowest score picked, and the band of its noise."""
    figure = _histogram(found, f"score: {unit}")
    if edge is not None:
        line = {"dash": "dash", "width": 1.2, "color": _TEXT}
        figure.add_vline(
            edge.cut, line=line, annotation={"text": "lowest pick"}, annotation_position="top"
        )
        if edge.noise:
            ends = (edge.cut - edge.noise.width, edge.cut + edge.noise.width)
            figure.add_vrect(*ends, line_width=0, fillcolor=_BAND, layer="below")
    return plotly_json(figure)


def spectrum(spectra: Mapping[str, Any]) -> dict[str, Any]:
    """Singular values on a logarithmic axis, and cumulative variance with the 95 % line."""
    figure = make_subplots(cols=2, subplot_titles=("singular value", "cumulative variance"))
    for number, (label, found) in enumerate(spectra.items()):
        sigma = [s if s > 0 else None for s in found["singular_values"]]
        line: dict[str, Any] = {"line": {"color": colour(number, len(spectra)), "width": 2}}
        line |= {"mode": "lines+markers", "marker_size": 4, "name": label}
        x = [*range(1, len(sigma) + 1)]
        figure.add_scatter(x=x, y=sigma, **line, row=1, col=1)
        figure.add_scatter(
            x=x, y=found["cumulative_variance"], **line, showlegend=False, row=1, col=2
        )
    last = [*spectra.values()][-1]
    place: Any = {"row": 1, "col": 2}
    line = {"width": 1, "color": MUTED}
    figure.add_hline(
        0.95,
        line=line | {"dash": "dash"},
        annotation_text="95\u00a0%",
        annotation_position="bottom left",
        **place,
    )
    figure.add_vline(last["r95"], line=line | {"dash": "dot"}, **place)
    figure.update_yaxes(type="log", dtick="D2", tickformat=".0e", row=1, col=1)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=2)
    figure.update_xaxes(title="number of the direction")
    figure.update_layout(height=_HEIGHT, showlegend=len(spectra) > 1)
    return plotly_json(figure)


def colour(number: int, total: int) -> str:
    """Return the colour of the n-th of so many adapters: the last has the page's accent."""
    palette = (PICKS, POOL, _TEXT, MUTED)
    return palette[(total - 1 - number) % len(palette)]

"""The figures of the report, as Plotly's JSON; what is counted is counted before it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from gradsift.report.exhibits import plotly_json
from gradsift.report.target_page import Histogram
from gradsift.selection.source_shares import SourceShare

_SOURCES = 20


def sources(shares: Sequence[SourceShare]) -> dict[str, Any]:
    """Bars: each source's share of the picks beside its share of the pool."""
    shown = shares[:_SOURCES][::-1]
    names = [escape(share.source, quote=False) for share in shown]  # Plotly reads tags in names
    figure = go.Figure(
        [
            go.Bar(y=names, x=[s.of_pool for s in shown], name="pool", orientation="h"),
            go.Bar(y=names, x=[s.of_picks for s in shown], name="picks", orientation="h"),
        ]
    )
    figure.update_layout(
        xaxis={"tickformat": ".0%", "title": "share of the rows"},
        yaxis={"automargin": True, "type": "category"},
        height=160 + 34 * len(shown),
    )
    return plotly_json(figure)


def histogram(found: Histogram, title: str, log: bool = False) -> go.Figure:
    """Bars: shares of pool and picks, one over the other."""
    edges = np.log10(found.edges) if log else found.edges
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    labels = [f"{a:,.4g} to {b:,.4g}" for a, b in zip(found.edges, found.edges[1:], strict=False)]
    figure = go.Figure(
        [
            go.Bar(
                x=middles, y=values, width=widths, name=name, opacity=0.65, customdata=labels,
                hovertemplate="%{customdata}: %{y:.2%}",
            )
            for name, values in (("pool", found.pool), ("picks", found.picks))
        ]
    )  # fmt: skip
    figure.update_layout(
        barmode="overlay", xaxis={"title": title}, height=340,
        yaxis={"tickformat": ".0%", "title": "share of the rows"},
    )  # fmt: skip
    if log:
        ticks = [m * 10.0**n for n in range(6) for m in (1, 2, 5)]
        ticks = [t for t in ticks if found.edges[0] <= t <= found.edges[-1]]
        figure.update_xaxes(tickvals=np.log10(ticks), ticktext=[f"{t:,.0f}" for t in ticks])
    return figure


def lengths(found: Histogram) -> dict[str, Any]:
    """Bars: tokens per example, on a logarithmic axis."""
    return plotly_json(histogram(found, "tokens per example", log=True))


def scores(found: Histogram, cut: float | None, noise: float | None) -> dict[str, Any]:
    """Bars: scores, the lowest score picked, and the band of its noise."""
    figure = histogram(found, "score")
    if cut is not None:
        figure.add_vline(cut, line_dash="dash", annotation_text="lowest pick")
        if noise:
            figure.add_vrect(cut - noise, cut + noise, opacity=0.25, line_width=0, fillcolor="gray")
    return plotly_json(figure)


def spectrum(spectra: Mapping[str, Any]) -> dict[str, Any]:
    """Singular values on a logarithmic axis, and cumulative variance with the 95 % line."""
    figure = make_subplots(cols=2, subplot_titles=("singular values", "cumulative variance"))
    for number, (label, found) in enumerate(spectra.items()):
        sigma = [s if s > 0 else None for s in found["singular_values"]]
        line = {"line_color": colour(number), "mode": "lines+markers", "name": label}
        x = [*range(1, len(sigma) + 1)]
        figure.add_scatter(x=x, y=sigma, **line, row=1, col=1)
        figure.add_scatter(
            x=x, y=found["cumulative_variance"], **line, showlegend=False, row=1, col=2
        )
    last = [*spectra.values()][-1]
    figure.add_hline(0.95, line_dash="dash", annotation_text="95 %", row=1, col=2)  # type: ignore[arg-type]
    figure.add_vline(last["r95"], line_dash="dot", row=1, col=2)  # type: ignore[arg-type]
    figure.update_yaxes(type="log", exponentformat="power", row=1, col=1)
    figure.update_yaxes(tickformat=".0%", row=1, col=2)
    figure.update_xaxes(title="direction")
    figure.update_layout(height=360)
    return plotly_json(figure)


def colour(number: int) -> str:
    """Return the colour of the n-th adapter, the same in every figure."""
    palette = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
    return palette[number % len(palette)]

"""What was measured of one target, as figures and tables with a sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from gradsift.report.exhibits import Exhibit, plotly_json
from gradsift.report.figures import MUTED, PICKS, SEQUENTIAL, SIGNED, colour, spectrum

_LAYERS = 40  # bars


def exhibits(found: Mapping[str, Any]) -> list[Exhibit]:
    """Return what `geometry.json` holds of a target, to be shown."""
    places, coupling = found["places"], found["coupling"]
    return [
        _spectra(places),
        _eigenvalues(places),
        _angles(places),
        _coupling(coupling),
        _masses(coupling),
        _entries(coupling),
    ]


def _spectra(places: Mapping[str, Any]) -> Exhibit:
    figure = spectrum({label: place["spectrum"] for label, place in places.items()})
    rows = [
        [label, *(str(place["spectrum"][key]) for key in ("num_examples", "r95", "r99", "rank"))]
        for label, place in places.items()
    ]
    text = (
        "How many directions hold the target's gradients, at each adapter: the fewer, the more its "
        "examples ask for the same."
    )
    table = [["at", "examples", "directions for 95 %", "for 99 %", "kept"], *rows]
    return Exhibit("Spectrum of the gradients", text, figure, table)


def _eigenvalues(places: Mapping[str, Any]) -> Exhibit:
    figure = make_subplots(
        cols=2, subplot_titles=("eigenvalue, by magnitude", "share inside the subspace")
    )
    for number, (label, place) in enumerate(places.items()):
        found = place["hessian"]
        bars = {"marker_color": colour(number, len(places)), "name": label}
        x = [*range(1, len(found["eigenvalues"]) + 1)]
        figure.add_bar(x=x, y=found["eigenvalues"], **bars, row=1, col=1)
        figure.add_bar(x=x, y=found["captured"], **bars, showlegend=False, row=1, col=2)
    figure.update_xaxes(title="number of the eigenvector", type="category")
    figure.update_yaxes(range=[0, 1], tickformat=".0%", row=1, col=2)
    figure.update_layout(height=360)
    last = [*places.values()][-1]["hessian"]
    by_chance = last["rank"] / last["num_parameters"]
    negative = sum(value < 0 for value in last["eigenvalues"])
    text = (
        f"The directions in which the target's loss curves most (leading eigenvectors of its "
        f"Hessian over {last['num_examples']} of its examples), and how much of each lies in the "
        f"{last['rank']} directions that GIST keeps of these examples: "
        f"{_percent(np.mean(last['captured']))} in the mean, "
        f"where chance would give {by_chance:.2%}. {negative} of the {len(last['eigenvalues'])} "
        "eigenvalues are negative: there the loss curves downwards, as it never does at a minimum, "
        "and gradients alone do not show it."
    )
    return Exhibit("Curvature and the subspace", text, plotly_json(figure))


def _angles(places: Mapping[str, Any]) -> Exhibit:
    figure = go.Figure()
    rows = []
    ticks = sorted({a["rank"] for place in places.values() for a in place["hessian"]["angles"]})
    for number, (label, place) in enumerate(places.items()):
        angles = place["hessian"]["angles"]
        line = {"line_color": colour(number, len(places))}
        ranks = [angle["rank"] for angle in angles]
        for key, kind, dash in (("largest_sine", "largest", "solid"), ("rms_sine", "rms", "dot")):
            y = [angle[key] for angle in angles]
            figure.add_scatter(x=ranks, y=y, name=f"{label}, {kind}", line_dash=dash, **line)
        for angle in angles:
            numbers = [str(angle["rank"]), str(angle["eigenvectors"])]
            rows.append(
                [label, *numbers, f"{angle['largest_sine']:.3f}", f"{angle['rms_sine']:.3f}"]
            )
    figure.update_xaxes(title="GIST directions", type="log", tickvals=ticks, ticktext=ticks)
    figure.update_yaxes(title="sine of the angle", range=[0, 1.05])
    figure.update_layout(height=380)
    last = [*places.values()][-1]["hessian"]
    by_chance = np.sqrt(1 - last["rank"] / last["num_parameters"])
    text = (
        "Sines of the principal angles between the first directions of GIST and as many leading "
        "eigenvectors of the Hessian (or all that were computed): 0 where one space holds the "
        f"other, 1 at right angles. Random directions would give {by_chance:.4f} at the last rank."
    )
    table = [["at", "GIST directions", "eigenvectors", "largest sine", "rms sine"], *rows]
    return Exhibit("Principal angles, by rank", text, plotly_json(figure), table)


def _coupling(coupling: Mapping[str, Any]) -> Exhibit:
    layers = coupling["layers"]
    figure = go.Figure(
        go.Bar(
            x=[*layers][:_LAYERS],
            y=[found["value"] for found in layers.values()][:_LAYERS],
            error_y={
                "type": "data",
                "array": [found["standard_error"] for found in layers.values()][:_LAYERS],
                "color": MUTED,
                "thickness": 1.2,
            },
            marker_color=PICKS,
        )
    )
    figure.update_yaxes(title="share of the layer’s own part", tickformat=".0%")
    figure.update_xaxes(automargin=True, tickfont_size=9)
    figure.update_layout(height=460)
    drawn = f"; the first {_LAYERS} of {len(layers)} are drawn" if len(layers) > _LAYERS else ""
    share = {name: _plus_minus(coupling[name]) for name in ("off_diagonal", "cross")}
    text = (
        f"{share['off_diagonal']} of the Hessian's squared Frobenius norm lies where no diagonal "
        "matrix reaches: the best diagonal D leaves ‖H − D‖² of that size, so that much of the "
        "curvature a diagonal preconditioner such as Adam's cannot hold, whatever its entries (in "
        "axes turned at random nearly any matrix of this size would be as far from a diagonal). "
        f"{share['cross']} of the norm lies between A and B of the same layer (in the figure: of "
        f"each layer's own part{drawn}), "
        f"{_plus_minus(coupling['between_layers'])} between different layers. Random probes, over "
        f"{coupling['num_examples']} target examples; ± is the standard error."
    )
    table = [
        ["part of ‖H‖²", "share", "standard error"],
        *(
            [name, f"{coupling[key]['value']:.3f}", f"{coupling[key]['standard_error']:.3f}"]
            for name, key in (
                ("off the diagonal", "off_diagonal"),
                ("between A and B of the same layer", "cross"),
                ("between different layers", "between_layers"),
            )
        ),
    ]
    return Exhibit("What a diagonal cannot hold", text, plotly_json(figure), table)


def _masses(coupling: Mapping[str, Any]) -> Exhibit:
    figure = _heat(
        np.log10(np.maximum(coupling["masses"], 1e-30)).astype(np.float32),
        coupling["blocks"],
        SEQUENTIAL,
        "power of ten",
    )
    text = (
        "Squared Frobenius norm of the Hessian between every two LoRA matrices (powers of ten): "
        "everything beside the diagonal of this picture is coupling that a method which looks at "
        "one matrix at a time does not see."
    )
    return Exhibit("Coupling between matrices", text, plotly_json(figure))


def _entries(coupling: Mapping[str, Any]) -> Exhibit:
    found = coupling["entries"]
    matrix = np.array(found["matrix"])
    figure = _heat(matrix, found["labels"], SIGNED, "second derivative")
    bound = float(np.quantile(np.abs(matrix), 0.98)) or 1.0
    figure.update_traces(zmin=-bound, zmax=bound)
    text = (
        f"Entries of the Hessian among parameters of {found['layer']}, the layer with the most "
        "between its A and its B, spread evenly over both: a diagonal preconditioner sees the "
        "diagonal alone. Colours end at the 98th percentile of the magnitudes."
    )
    return Exhibit("Entries of one layer", text, plotly_json(figure))


def _heat(
    matrix: np.ndarray, labels: Sequence[str], colours: Sequence[tuple[float, str]], unit: str
) -> go.Figure:
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 12, "outlinewidth": 0}
    figure = go.Figure(go.Heatmap(z=matrix, x=labels, y=labels, colorscale=colours, colorbar=bar))
    figure.update_yaxes(autorange="reversed", tickfont_size=8)
    figure.update_xaxes(tickfont_size=8)
    figure.update_layout(height=620)
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _plus_minus(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['value']:.1f} ± {100 * estimate['standard_error']:.1f} %"

"""The tables and the figure of `evidence.py`, out of what it left in `results/`.

    python benchmarks/evidence_page.py runs/evidence

writes `page.md`, the tables of docs/results.md, and `figure.html` into that folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from scipy import stats

from gradsift.evaluation.tables import amount, markdown
from gradsift.evaluation.verdicts import REFERENCES

_COLOURS = {"better": "#0072b2", "worse": "#d55e00", "no difference": "#777777"}


def main(folder: Path) -> None:
    """Write both."""
    results = folder / "results"
    table, trainings = read(results / "methods", "table"), read(results / "methods", "trainings")
    text = [*_sections(results, table, trainings)]
    (folder / "page.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    figure(table).write_html(folder / "figure.html", include_plotlyjs=True)


def read(part: Path, name: str) -> pd.DataFrame:
    """Return one table of a part; an empty one where the part has not been run."""
    path = part / f"{name}.parquet"
    return pd.read_parquet(path) if path.exists() else pd.DataFrame()


def _sections(results: Path, table: pd.DataFrame, trainings: pd.DataFrame) -> Iterator[str]:
    yield "Held-out loss less that of random picks, 5 %\n\n" + effects(table)
    yield "References\n\n" + references(table)
    yield "Less gist's, in per cent of random's loss\n\n" + against_gist(trainings)
    for name in ("budgets", "warmups"):
        if len(own := read(results / name, "table")):
            yield f"{name}\n\n" + "\n\n".join(
                f"{budget}\n\n{effects(rows)}" for budget, rows in own.groupby("budget", sort=False)
            )
    if len(lds := read(results / "lds", "lds")):
        yield "Linear datamodeling score\n\n" + datamodeling(lds)
    if len(doses := read(results / "doses", "doses")):
        yield "Dose and response\n\n" + responses(doses)


def effects(table: pd.DataFrame) -> str:
    """Return a row per method: its difference to random for each target, mean rank, and cost.

    Bold: better beyond the noise; italic: worse. The rank is that of the loss among all methods
    and random, 1 the best, its mean taken over the targets.
    """
    own = table[~table.method.isin(("base", "full"))]
    ranks = own.groupby("target").loss.rank().groupby(own.method).mean()
    cells = [
        _marked(interval(row, "difference", "difference_low", "difference_high"), row.verdict)
        if row.method != "random"
        else "0"
        for _, row in own.iterrows()
    ]
    more = {
        "mean rank": ranks.map("{:.1f}".format),
        "operations": own.groupby("method").flops.first().map(_operations),
    }
    return by_target(own.assign(cell=cells), more)


def _marked(text: str, verdict: str) -> str:
    return {"better": f"**{text}**", "worse": f"*{text}*"}.get(verdict, text)


def _operations(flops: float) -> str:
    return "" if np.isnan(flops) else amount(flops, "FLOP")


def references(table: pd.DataFrame) -> str:
    """Return the losses of the base model and of random picks for each target."""
    own = table[table.method.isin(REFERENCES)]
    cells = [f"{row.loss:.4f} ± {row.loss_std:.4f}" for _, row in own.iterrows()]
    return by_target(own.assign(cell=cells))


def against_gist(trainings: pd.DataFrame) -> str:
    """Return each variant's and method's loss less gist's, with 95 % intervals.

    In per cent of the loss of random picks, so that a mean over the targets means something. The
    variance is that of single fine-tunings, pooled over the methods of a target; the draw of
    held-out examples is not in it.
    """
    rows, means, degrees = [], {}, 0
    for target, own in trainings.groupby("target", sort=False):
        unit = own[own.method == "random"].loss.mean() / 100
        methods = own[~own.method.isin(REFERENCES)]
        groups = methods.groupby("method", sort=False).loss
        freedom = (groups.count() - 1).sum()
        degrees += freedom
        variance = (groups.var() * (groups.count() - 1)).sum() / freedom
        for method, losses in groups:
            count = min(len(losses), groups.count()["gist"])
            value = (losses.mean() - groups.mean()["gist"]) / unit
            error = np.sqrt(2 * variance / count) / unit
            half = stats.t.ppf(0.975, freedom) * error
            means.setdefault(method, []).append((value, error))
            rows.append((target, method, f"{value:+.2f} ± {half:.2f}"))
    for method, found in means.items():
        values, errors = np.array(found).T
        half = stats.t.ppf(0.975, degrees) * np.sqrt((errors**2).sum()) / len(errors)
        rows.append(("mean", method, f"{values.mean():+.2f} ± {half:.2f}"))
    frame = pd.DataFrame(rows, columns=["target", "method", "cell"])
    return by_target(frame[frame.method != "gist"])


def datamodeling(lds: pd.DataFrame) -> str:
    """Return the linear datamodeling score of each method for each target."""
    cells = [interval(row, "value", "low", "high", digits=2) for _, row in lds.iterrows()]
    return by_target(lds.assign(cell=cells))


def responses(doses: pd.DataFrame) -> str:
    """Return the loss after each part of a ranking, the best first, and the trend over them."""
    parts = sorted(set(doses.part))
    rows = [["target", "method", *(f"part {part}" for part in parts), "trend"]]
    for (target, method), own in doses.groupby(["target", "method"], sort=False):
        losses = [f"{loss:.3f}" for loss in own.sort_values("part").loss]
        trend = interval(own.iloc[0], "trend", "trend_low", "trend_high", digits=2)
        rows.append([str(target), str(method), *losses, trend])
    return markdown(rows)


def interval(row: pd.Series, value: str, low: str, high: str, digits: int = 4) -> str:
    """Return an estimate with its interval."""
    return f"{row[value]:+.{digits}f} [{row[low]:+.{digits}f}, {row[high]:+.{digits}f}]"


def by_target(table: pd.DataFrame, more: dict[str, pd.Series] | None = None) -> str:
    """Return a Markdown table: a row per method, a column per target, more columns after them."""
    wide = table.pivot_table("cell", "method", "target", aggfunc="first", sort=False)
    for name, values in (more or {}).items():
        wide[name] = values
    rows = ([name, *map(str, row)] for name, row in wide.iterrows())
    return markdown([["method", *map(str, wide.columns)], *rows])


def figure(table: pd.DataFrame) -> go.Figure:
    """Return each method's difference to random with its interval, a panel per target."""
    targets = [*dict.fromkeys(table.target)]
    figure = make_subplots(cols=len(targets), shared_yaxes=True, subplot_titles=targets)
    for column, target in enumerate(targets, start=1):
        own = table[(table.target == target) & ~table.method.isin(REFERENCES)]
        figure.add_scatter(
            x=own.difference, y=own.method, mode="markers", showlegend=False,
            marker={"size": 9, "color": [_COLOURS[verdict] for verdict in own.verdict]},
            error_x={
                "array": own.difference_high - own.difference,
                "arrayminus": own.difference - own.difference_low, "thickness": 1.2, "width": 3,
            },
            row=1, col=column,
        )  # fmt: skip
        figure.add_vline(0, line={"dash": "dot", "width": 1}, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(template="simple_white", width=1200, height=520, margin={"t": 40})
    return figure


if __name__ == "__main__":
    main(Path(sys.argv[1]))

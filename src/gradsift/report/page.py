"""The page itself: Jinja's template filled in, Plotly and DataTables beside it in the same file."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gradsift.report import figures
from gradsift.report.overview import Overview
from gradsift.report.target_page import TargetPage

_HERE = Path(__file__).parent


def render(overview: Overview, pages: Sequence[TargetPage]) -> str:
    """Return the report as one HTML file that loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": _format_bytes, "seconds": _format_duration, "json": _embedded}
    return environment.get_template("page.html").render(
        overview=overview,
        pages=pages,
        drawn={page.name: _figures(page) for page in pages},
        tables={page.name: _table(page) for page in pages},
        version=version("gradsift"),
        **_assets(),
    )


def _figures(page: TargetPage) -> dict[str, Any]:
    width = page.noise.width if page.noise else None
    drawn = {
        "sources": figures.sources(page.sources),
        "lengths": figures.lengths(page.lengths),
        "scores": figures.scores(page.scores, page.cut, width),
    }
    if page.spectra:
        drawn["spectrum"] = figures.spectrum(page.spectra)
    shown = {f"exhibit-{n}": e.figure for n, e in enumerate(page.exhibits) if e.figure}
    return drawn | shown


def _table(page: TargetPage) -> dict[str, Any]:
    """Return the rows for DataTables, the winners' texts apart: many rows have the same."""
    rows = [
        [
            line.status,
            line.place,
            round(line.score, 4),
            None if line.share is None else round(line.share, 4),
            line.source,
            line.num_tokens,
            line.id,
            line.text,
            line.best,
        ]
        for line in page.lines
    ]
    return {"rows": rows, "winners": page.winners}


def _assets() -> dict[str, Any]:
    """Return style, our script, and the two libraries as they come in their packages."""
    from itables.utils import read_package_file
    from plotly.offline import get_plotlyjs

    plotly, tables = get_plotlyjs(), read_package_file("html", "dt_bundle.js")
    assert "</script" not in plotly.lower()
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    return {
        "style": Markup(read_package_file("html", "dt_bundle.css") + style),
        "script": Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        "plotly": Markup(plotly),
        "datatables": b64encode(tables.encode()).decode(),
    }


def _embedded(value: Any) -> Markup:
    """Return a value as JSON that can stand inside a script element: no `<` is left in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _format_bytes(number: int) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1000  # type: ignore[assignment]
    raise AssertionError


def _format_duration(seconds: float) -> str:
    """Return a duration in words.

    >>> _format_duration(3725.0)
    '1 h 2 min'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

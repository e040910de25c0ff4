"""The page itself: Jinja's templates filled in, style, scripts and Plotly in the same file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gradsift.errors import shorten
from gradsift.progress import format_seconds
from gradsift.report import figures, wording
from gradsift.report.overview import Overview
from gradsift.report.target_page import TargetPage

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_NAME = 80  # characters of an id or a source
_SCRIPTS = ("figures.js", "examples.js", "page.js")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": _format_bytes,
        "count": "{:,}".format,
        "json": _embedded,
        "percent": wording.percent,
        "seconds": format_seconds,
        "short": _name,
        "times": wording.times,
    }
    environment.globals["wording"] = wording
    return environment


def render(overview: Overview, pages: Sequence[TargetPage]) -> str:
    """Return the report as one HTML file that loads nothing from anywhere."""
    return (
        _environment()
        .get_template("page.html")
        .render(
            overview=overview,
            pages=pages,
            drawn={page.key: _figures(page) for page in pages},
            examples={page.key: _examples(page) for page in pages},
            version=version("gradsift"),
            **_assets(),
        )
    )


def _figures(page: TargetPage) -> dict[str, Any]:
    drawn = {
        "lengths": figures.lengths(page.lengths),
        "scores": figures.scores(page.scores, page.edge, wording.score_unit(page)),
    }
    if page.spectra:
        drawn["spectrum"] = figures.spectrum(page.spectra)
    for part, exhibits in (("evaluation", page.evaluation), ("geometry", page.geometry)):
        drawn |= {f"{part}-{n}": e.figure for n, e in enumerate(exhibits, 1) if e.figure}
    return drawn


def _examples(page: TargetPage) -> dict[str, Any]:
    """Return what the list of examples is made of, the winners apart: many cards have the same."""
    numbers = {id_: number for number, id_ in enumerate(page.winners)}
    rows = [
        [
            card.status,
            card.place,
            round(card.score, 4),
            None if card.share is None else round(card.share, 4),
            _name(card.source),
            card.num_tokens,
            _name(card.id),
            card.turns,
            None if card.best is None else numbers[card.best],
        ]
        for card in page.cards
    ]
    return {"rows": rows, "winners": [(_name(id_), turns) for id_, turns in page.winners.items()]}


def _name(text: str) -> str:
    return shorten(text, _LONGEST_NAME)


def _assets() -> dict[str, Any]:
    """Return the style, our scripts, and Plotly as it comes in its package."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    assert "</script" not in plotly.lower()
    scripts = [(_TEMPLATES / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    return {
        "style": Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        "script": Markup("\n".join(scripts)),
        "plotly": Markup(plotly),
        "plotly_license": Markup(_license("plotly")),
    }


def _license(package: str) -> str:
    """Return the license that an installed package brings along."""
    files = distribution(package)
    text = files.read_text("licenses/LICENSE.txt") or files.read_text("LICENSE.txt")
    assert text, "who passes its code on passes its license on"
    return text


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

"""`gradsift settings`: every key of the configuration, made from its own descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from gradsift.cli.output import show

if TYPE_CHECKING:
    from rich.console import Console

    from gradsift.sections import Setting

SectionName = Annotated[
    str | None, typer.Argument(help="such as warmup, or evaluate; all if none is given")
]


def settings(section: SectionName = None) -> None:
    """List the settings: every key, its default, what it does, and the paper's value."""
    from gradsift.errors import ConfigError, suggest

    found = all_settings()
    if section is not None:
        if section not in found:
            raise ConfigError(
                f"there is no section {section!r}{suggest(section, found)} "
                f"(known: {', '.join(found)})"
            )
        found = {section: found[section]}
    show(found, partial(_print_settings, found))


def all_settings() -> dict[str, list[Setting]]:
    """Return the settings of a run by section, then those of `evaluate` and `geometry`."""
    from gradsift.config import Config
    from gradsift.evaluation.config import EvaluationConfig
    from gradsift.geometry.config import GeometryConfig
    from gradsift.sections import describe

    grouped = groupby(describe(Config), key=lambda setting: setting.key.partition(".")[0])
    return {
        **{name: [*own] for name, own in grouped},
        "evaluate": describe(EvaluationConfig),
        "geometry": describe(GeometryConfig),
    }


def _print_settings(sections: Mapping[str, Sequence[Setting]], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    for name, settings in sections.items():
        table = Table("key", "default", "what it does", "paper", title=name)
        for one in settings:
            cells = (one.key, one.default, one.description, one.paper or "")
            table.add_row(*map(escape, cells))
        console.print(table)

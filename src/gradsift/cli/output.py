"""What the verbs print: tables or JSON on standard output, the log beside them.

Every verb that prints has `--json`, `--quiet` and `--verbose`: `with_output` gives it those.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.runs import layout

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Output:
    """What the command line asks to be printed, and how much is said beside it."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def level(self) -> int:
        """What of the log goes to the terminal."""
        return logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO


output_options = Output()
_OPTIONS = {
    "as_json": ("--json", "print one JSON document, and nothing else there"),
    "quiet": ("--quiet,-q", "say only warnings and errors beside the result"),
    "verbose": ("--verbose,-v", "say more: times, levels, where an error came from"),
}


def with_output(verb: Callable[..., None]) -> Callable[..., None]:
    """Return the verb with the options that say how its result is printed."""

    @functools.wraps(verb)
    def run(**given: Any) -> None:
        for name in _OPTIONS:
            setattr(output_options, name, given.pop(name))
        verb(**given)

    hints = typing.get_type_hints(verb, include_extras=True)
    own = inspect.signature(verb)
    added = []
    for name, (flags, text) in _OPTIONS.items():
        hints[name] = Annotated[bool, typer.Option(*flags.split(","), help=text)]
        kind = inspect.Parameter.KEYWORD_ONLY
        added.append(inspect.Parameter(name, kind, default=False, annotation=hints[name]))
    parameters = [p.replace(annotation=hints[p.name]) for p in own.parameters.values()]
    run.__signature__ = own.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run


def show(document: Any, print_tables: Callable[[Console], None]) -> None:
    """Print a result: as JSON if that was asked for, else as tables."""
    if output_options.as_json:
        text = json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")
    else:
        from rich.console import Console

        print_tables(Console())


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it; a number that is none is null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def path_in_run(location: str, name: str) -> str:
    """Return where a file of a run folder lies, as its user named the folder.

    >>> path_in_run("s3://bucket/run/", "report.html")
    's3://bucket/run/report.html'
    """
    from gradsift.errors import visible

    return visible(f"{location.rstrip('/')}/{name}")


def print_path(console: Console, location: str, name: str) -> None:
    """Print where a file of a run folder lies, on one line however long, to be copied whole."""
    path = path_in_run(location, name)
    console.print(f"→ {path}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def log_to(location: str | None) -> Iterator[None]:
    """Send our log to the terminal and, unless `location` is None, to that run folder."""
    from gradsift import progress

    logger = logging.getLogger("gradsift")
    logger.setLevel(logging.DEBUG)
    progress.set_bars(not output_options.quiet)
    console = logging.StreamHandler()
    console.setLevel(output_options.level)
    line = "%(asctime)s %(levelname)s %(message)s" if output_options.verbose else "%(message)s"
    console.setFormatter(progress.VisibleFormatter(line))
    handlers: list[logging.Handler] = [console]
    if location is not None:  # opened with the first line, when the folder is known to be ours
        from gradsift.runs.opening import local_folder

        folder = local_folder(location, fetch=False)
        handlers.append(progress.LogFile(folder / layout.LOG, delay=True, encoding="utf-8"))
        line = "%(asctime)s %(levelname)s %(message)s"
        handlers[-1].setFormatter(progress.VisibleFormatter(line))
        handlers[-1].setLevel(min(output_options.level, logging.INFO))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("interrupted; the same command goes on from here")
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()

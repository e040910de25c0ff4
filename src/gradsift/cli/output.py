"""What the verbs print with: the console, paths inside a run folder, and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradsift.runs import layout

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> Console:
    """Return a console on standard output."""
    from rich.console import Console

    return Console()


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
    from gradsift.progress import LogFile, VisibleFormatter

    logger = logging.getLogger("gradsift")
    logger.setLevel(logging.INFO)
    console = logging.StreamHandler()
    console.setFormatter(VisibleFormatter("%(message)s"))
    handlers: list[logging.Handler] = [console]
    if location is not None:  # opened with the first line, when the folder is known to be ours
        from gradsift.runs.opening import local_folder

        folder = local_folder(location, fetch=False)
        handlers.append(LogFile(folder / layout.LOG, delay=True, encoding="utf-8"))
        handlers[-1].setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(message)s"))
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

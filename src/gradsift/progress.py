"""What is said while a run is at work: progress, as a bar or in lines, and the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradsift.errors import visible

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def track(label: str, total: int, unit: str = "examples") -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` units of work; call what it yields with each amount done."""
    started = time.monotonic()
    yield from _bar(label, total, unit) if sys.stderr.isatty() else _lines(label, total, unit)
    seconds = time.monotonic() - started
    logger.info("%s: %d %s in %.1f s, %.3g/s", label, total, unit, seconds, total / seconds)


def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        Remaining(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, rate="")
        started, done = time.monotonic(), 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            rate = done / max(time.monotonic() - started, 1e-9)
            progress.update(task, completed=done, rate=f"{rate:.3g} {unit}/s")

        yield advance


def _lines(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last, rate = now, done / (now - started)
            left = (total - done) / rate
            logger.info(
                "%s: %d of %d %s, %.3g/s, %.0f s left", label, done, total, unit, rate, left
            )

    yield advance


class VisibleFormatter(logging.Formatter):
    """Lines of the log as a terminal can show them, whatever names of the data are in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, its control characters shown instead of sent."""
        return visible(super().format(record))


class LogFile(logging.FileHandler):
    """The log in the run folder; that it cannot be written is said once, and ends nothing."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            super().emit(record)  # opens the file with the first line
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say it on the terminal, where the log goes as well."""
        if not self._failed:
            self._failed = True
            sys.stderr.write(f"gradsift: cannot write {visible(self.baseFilename)}\n")

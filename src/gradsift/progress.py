"""What is said while a run is at work: progress, as a bar or in lines, and the log."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from gradsift.errors import visible

logger = logging.getLogger(__name__)

_SECONDS_TO_FIRST_LINE, _SECONDS_BETWEEN_LINES = 10.0, 30.0
_bars = True
_listening: list[Tracker] = []  # those that are told of batches, the innermost last
_counted = False  # whether the batches of this moment are those of the tracked work


def set_bars(shown: bool) -> None:
    """Say whether progress may be drawn as a bar on a terminal."""
    global _bars  # noqa: PLW0603
    _bars = shown


@dataclass
class Tracker:
    """How much of a whole is done, and how long the rest will take.

    Work is counted in units (`advance`: finished for good) or, where the whole is known in tokens,
    already in batches of units that are not finished. `total` may be unknown. Rate and time left
    are those since the first report: what comes before it, such as loading a model, does not count.
    """

    label: str
    total: int | None
    unit: str = "examples"
    tokens: int | None = None
    show: Callable[[Tracker], None] = lambda tracker: None
    clock: Callable[[], float] = time.monotonic
    finished: int = 0
    in_batches: int = 0  # of those that are not finished
    tokens_seen: int = 0
    first_report: tuple[float, int, int] | None = None  # when, and `done` and `work` by then

    def __post_init__(self) -> None:
        self.started = self.clock()

    def advance(self, amount: int) -> None:
        """Count some units as finished."""
        self.finished += amount
        self.in_batches = max(0, self.in_batches - amount)
        self._report()

    def count_batch(self, units: int, tokens: int) -> None:
        """Count a batch of units that are measured, but not finished."""
        self.in_batches += units
        self.tokens_seen += tokens
        self._report()

    def _report(self) -> None:
        self.first_report = self.first_report or (self.clock(), self.done, self._work)
        self.show(self)

    @property
    def done(self) -> int:
        """Units that are finished or measured."""
        done = self.finished + self.in_batches
        return done if self.total is None else min(done, self.total)

    @property
    def _work(self) -> int:
        """What is done: in tokens where batches are told of, else in units."""
        return self.tokens_seen if self.tokens_seen else self.done

    @property
    def _since(self) -> tuple[float, int, int]:
        """When the rate is reckoned from, with `done` and `work` of then."""
        if self.first_report is None or self.first_report[2] == self._work:
            return self.started, 0, 0
        return self.first_report

    @property
    def rate(self) -> float:
        """Units per second."""
        since, done, _ = self._since
        return (self.done - done) / max(self.clock() - since, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest will take; none before anything is known."""
        whole = self.tokens if self.tokens_seen else self.total
        since, _, work = self._since
        rate = (self._work - work) / max(self.clock() - since, 1e-9)
        return None if whole is None or not rate else max(whole - self._work, 0) / rate


@contextmanager
def track(
    label: str, total: int | None, unit: str = "examples", tokens: int | None = None
) -> Iterator[Callable[[int], None]]:
    """Show the progress of `total` units of work; call what it yields with each amount done.

    `tokens`: how many all of them have together; batches that this process measures are then shown
    as well (`count_batch`).
    """
    drawn = _bars and sys.stderr.isatty()
    with _bar(label, total) if drawn else nullcontext(_Lines().show) as show:
        tracker = Tracker(label, total, unit, tokens, show)
        if tokens:
            _listening.append(tracker)
        try:
            yield tracker.advance
        finally:
            if tokens:
                _listening.remove(tracker)
    seconds = time.monotonic() - tracker.started
    done = tracker.finished
    logger.info("%s: %d %s in %.1f s, %s/s", label, done, unit, seconds, _plain(done / seconds))


@contextmanager
def batches_counted() -> Iterator[None]:
    """Count the batches of this block as tracked work; those of what precedes it are not.

    If the block does not come to its end, because memory ran out, say, none of them counts.
    """
    global _counted  # noqa: PLW0603
    tracker = _listening[-1] if _listening else None
    before = (tracker.in_batches, tracker.tokens_seen) if tracker else (0, 0)
    _counted = True
    try:
        yield
    except BaseException:
        if tracker:
            tracker.in_batches, tracker.tokens_seen = before
        raise
    finally:
        _counted = False


def count_batch(units: int, tokens: int) -> None:
    """Tell whoever tracks this process's batches that one is measured.

    Of processes that share the work evenly under torchrun the first counts its own for all.
    """
    if _listening and _counted:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        _listening[-1].count_batch(units * processes, tokens * processes)


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Callable[[Tracker], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, rate="")

        def show(tracker: Tracker) -> None:
            left = tracker.seconds_left
            rate = f"{_plain(tracker.rate)} {tracker.unit}/s"
            rate += "" if left is None else f", {format_seconds(left)} left"
            progress.update(task, completed=tracker.done, rate=rate)

        yield show


class _Lines:
    """Progress where there is no terminal: a line in the log, the first one soon."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _SECONDS_TO_FIRST_LINE

    def show(self, tracker: Tracker) -> None:
        now, left = time.monotonic(), tracker.seconds_left
        if now < self._next:
            return
        self._next = now + _SECONDS_BETWEEN_LINES
        of = "" if tracker.total is None else f" of {tracker.total}"
        ends = "" if left is None else f", {format_seconds(left)} left"
        logger.info(
            "%s: %d%s %s, %s/s%s", tracker.label, tracker.done, of, tracker.unit,
            _plain(tracker.rate), ends,
        )  # fmt: skip


def _plain(rate: float) -> str:
    """Return a rate with three digits, and never as a power of ten.

    >>> _plain(2010.4), _plain(0.12345)
    ('2,010', '0.123')
    """
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def format_seconds(seconds: float) -> str:
    """Return a duration in words.

    >>> format_seconds(106.2), format_seconds(3725.0)
    ('1 min 46 s', '1 h 2 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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

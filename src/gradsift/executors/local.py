"""Everything in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Local:
    """One worker: this process."""

    def map(self, open_worker: Callable[[], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Do the tasks one after the other."""
        yield from open_worker()(tasks)

    def call(self, work: Callable[[], T]) -> T:
        """Run it in this process."""
        return work()

    def train(self, work: Callable[[], object]) -> None:
        """Run it in this process."""
        work()

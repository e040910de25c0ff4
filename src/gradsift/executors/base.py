"""Where work runs: in this process, beside others under torchrun, or on a Ray cluster.

Everything else asks an `Executor` and does not know how many machines there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")
Task = TypeVar("Task")
Worker = Callable[[Iterable[Task]], Iterator[Task]]
"""Does tasks and yields each when it is done and its result is safe."""


@runtime_checkable
class Executor(Protocol):
    """Runs work that can be sent to other processes."""

    def map(self, open_worker: Callable[[], Worker[Any]], tasks: Sequence[Any]) -> Iterator[Any]:
        """Do all tasks, each once, by as many workers as there are; yield each that is done."""
        ...

    def call(self, work: Callable[[], T]) -> T:
        """Do some work once, where there is a device for it, and return what it gives."""
        ...

    def train(self, work: Callable[[], object]) -> None:
        """Do some work in every process that takes part in a training, together."""
        ...

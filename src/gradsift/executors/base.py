"""Where work runs: in this process, beside others under torchrun, or on a Ray cluster.

Everything else asks an `Executor` and does not know how many machines there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")
Task = TypeVar("Task")
Item = TypeVar("Item")
Begun = TypeVar("Begun")
FEW = 8
"""Items of a stream that are done where they are asked for: elsewhere takes seconds to begin."""
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

    def stream(self, work: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
        """Do some work on each item, several at a time, and yield the results in their order.

        Only a few items are taken before the first of their results is.
        """
        ...

    def train(self, work: Callable[[], object]) -> None:
        """Do some work in every process that takes part in a training, together."""
        ...


def few_here(
    work: Callable[[Item], T],
    items: Iterable[Item],
    elsewhere: Callable[[Iterator[Item]], Iterator[T]],
) -> Iterator[T]:
    """Do the first items of a stream here, and let the rest, if there is any, be done elsewhere.

    >>> list(few_here(abs, range(-2, 8), lambda rest: (10 * item for item in rest)))
    [2, 1, 0, 1, 2, 3, 4, 5, 60, 70]
    """
    items = iter(items)
    yield from map(work, islice(items, FEW))
    for item in islice(items, 1):
        yield from elsewhere(chain([item], items))


def in_order(
    begin: Callable[[Item], Begun],
    wait: Callable[[Begun], T],
    items: Iterable[Item],
    at_once: int,
) -> Iterator[T]:
    """Begin work on some items at a time and yield what comes of each, in their order.

    >>> list(in_order(lambda item: [item], lambda begun: begun[0] * 10, range(4), at_once=2))
    [0, 10, 20, 30]
    """
    waiting: deque[Begun] = deque()
    items = iter(items)
    while True:
        waiting.extend(begin(item) for item in islice(items, at_once - len(waiting)))
        if not waiting:
            return
        yield wait(waiting.popleft())

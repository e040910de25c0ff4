"""Everything on this machine: the device's work in this process, the processors' in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from gradsift.errors import RunError
from gradsift.executors.base import few_here, in_order

T = TypeVar("T")
Item = TypeVar("Item")
_AHEAD = 2  # items at a process: one is done, one is ready
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # there is one for each


@dataclass(frozen=True)
class Local:
    """This process, and for work that needs no device one more for every processor."""

    def map(self, open_worker: Callable[[], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Do the tasks one after the other."""
        yield from open_worker()(tasks)

    def call(self, work: Callable[[], T]) -> T:
        """Run it in this process."""
        return work()

    def stream(self, work: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
        """Do it in as many processes as there are processors; a few items are done here.

        Raises:
            RunError: If one of the processes dies.
        """
        yield from few_here(work, items, partial(_in_processes, work))

    def train(self, work: Callable[[], object]) -> None:
        """Run it in this process."""
        work()


def _in_processes(work: Callable[[Item], T], items: Iterator[Item]) -> Iterator[T]:
    from loky import cpu_count, get_reusable_executor

    if (count := cpu_count()) == 1:
        yield from map(work, items)
        return
    processes: Any = get_reusable_executor(max_workers=count, env=_ENVIRONMENT)
    try:
        yield from in_order(
            lambda item: processes.submit(work, item), lambda begun: begun.result(), items,
            at_once=_AHEAD * count,
        )  # fmt: skip
    except BrokenProcessPool as error:
        raise RunError(
            "a process that works beside this one died, perhaps because memory ran out; run the "
            "same command again"
        ) from error
    finally:
        processes.shutdown(wait=True, kill_workers=True)

"""The processes that `torchrun` or `accelerate launch` started.

The first (rank 0) runs the command. The others wait for what it sends them: their share of the
tasks, or a training to take part in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from gradsift.executors.local import Local

T = TypeVar("T")
Item = TypeVar("Item")
_PATIENCE = timedelta(days=30)  # the others wait while the first one encodes or scores


@dataclass(frozen=True)
class Torchrun:
    """All processes of a launch, of which this is the first."""

    def map(self, open_worker: Callable[[], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Do every n-th task in this process, of n processes; the others do theirs."""
        _send(partial(_share, open_worker, tasks))
        yield from open_worker()(_own(tasks))
        yield from _gather(tasks)

    def call(self, work: Callable[[], T]) -> T:
        """Run it in this process."""
        return work()

    def stream(self, work: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
        """Do it by the processors of this machine: none but the first process has work then."""
        yield from Local().stream(work, items)

    def train(self, work: Callable[[], object]) -> None:
        """Do it in all processes."""
        _send(work)
        work()


@contextmanager
def launched_processes() -> Iterator[bool]:
    """Yield whether this process is to run the command.

    Of those that a launcher started, the first is; each of the others works for it until it ends,
    and yields after that. Without a launcher, every process runs its own command.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    import torch.distributed as dist

    # What is sent here, and barriers, go over gloo. NCCL's communicator is made at the first
    # collective of tensors on a GPU, and is on theirs: no GPU has to be the current one before
    # `use_device` takes it, and on the CPU none is opened.
    backend = "gloo" if not _has_gpu() else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    if dist.get_rank() == 0:
        try:
            yield True
        except SystemExit as stop:  # how Typer ends
            if stop.code:
                raise
        _send(None)
    else:
        while (work := _receive()) is not None:
            work()
        yield False
    dist.barrier()  # none may close its connections while another still reads from them
    # After a fault nothing is sent and nothing destroyed: the others may wait elsewhere, and this
    # process for them, before its message is out. It exits, and the launcher ends the others.
    dist.destroy_process_group()


def _share(open_worker: Callable[[], Any], tasks: Sequence[Any]) -> None:
    for _ in open_worker()(_own(tasks)):
        pass
    _gather(tasks)


def _own(tasks: Sequence[Any]) -> Sequence[Any]:
    import torch.distributed as dist

    return tasks[dist.get_rank() :: dist.get_world_size()]


def _gather(tasks: Sequence[Any]) -> Sequence[Any]:
    """Wait for all, and return the tasks of the others."""
    import torch.distributed as dist

    dist.barrier()
    others = range(1, dist.get_world_size())
    return [task for rank in others for task in tasks[rank :: dist.get_world_size()]]


def _send(work: Callable[[], object] | None) -> None:
    import torch.distributed as dist

    dist.broadcast_object_list([work])


def _receive() -> Callable[[], object] | None:
    import torch.distributed as dist

    received: list[Any] = [None]
    dist.broadcast_object_list(received)
    return received[0]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

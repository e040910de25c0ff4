"""Where work runs: in this process, beside others under torchrun, or on a Ray cluster.

Everything else asks an `Executor` and does not know how many machines there are.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from gradsift.config import EngineConfig

ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "MKL_CBWR": "AUTO,STRICT",  # the same bits whatever the number of threads
}
"""What every process of a run is to have in its environment before torch is imported."""


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


def set_environment() -> None:
    """Set what is not set of the environment, and silence the warnings of libraries."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)


def is_first() -> bool:
    """Return whether this process is the first of those that train together, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def decided_by_first(decide: Callable[[], T]) -> T:
    """Return what the first of the processes that train together decides, in all of them.

    All have to come here, so that each waits for the others.
    """
    if not _is_distributed():
        return decide()
    from torch import distributed

    decided: list[Any] = [decide() if is_first() else None]
    distributed.broadcast_object_list(decided)
    distributed.barrier()
    return decided[0]


def _is_distributed() -> bool:
    """Return whether this process has joined others; torch is there by then."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def choose_executor(config: EngineConfig) -> Executor:
    """Return where a run works: as its settings say, or with all processes that torchrun began.

    Raises:
        ConfigError: If Ray is asked for and not installed.
    """
    if config.executor == "ray":
        from gradsift.executors.ray import RayCluster

        return RayCluster.of(config)
    if _is_distributed():
        from gradsift.executors.torchrun import Torchrun

        return Torchrun()
    from gradsift.executors.local import Local

    return Local()

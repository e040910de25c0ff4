"""Of processes that train together: which one this is, and what all of them agree on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def is_first() -> bool:
    """Return whether this process is the first of those that train together, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def decided_by_first(decide: Callable[[], T]) -> T:
    """Return what the first of the processes that train together decides, in all of them.

    All have to come here, so that each waits for the others.
    """
    if not is_distributed():
        return decide()
    from torch import distributed

    decided: list[Any] = [decide() if is_first() else None]
    distributed.broadcast_object_list(decided)
    distributed.barrier()
    return decided[0]


def is_distributed() -> bool:
    """Return whether this process has joined others; torch is there by then."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()

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


def first_claim(thing: str) -> str | None:
    """Claim something for this process; return the rank of another that has claimed it before.

    This process has joined others; none waits for another here.
    """
    from torch import distributed

    rank = str(distributed.get_rank())
    store = distributed.distributed_c10d._get_default_store()
    owner = store.compare_set(f"gradsift/{thing}", "", rank).decode()  # set if nobody's yet
    return None if owner == rank else owner


def is_distributed() -> bool:
    """Return whether this process has joined others; torch is there by then."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()

"""The same bits again: whatever the number of threads of NumPy and SciPy, and on a GPU if asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

from gradsift.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # PyTorch reads it once, when it first calls cuBLAS


def use_deterministic_kernels() -> None:
    """Let PyTorch take only GPU kernels that add up in a fixed order, in this process from now on.

    It then chooses among its attention kernels by that, and an operation that has none raises a
    `RuntimeError` that names it. On a CPU all that gradsift does adds up in a fixed order anyway.
    Source: PyTorch's notes on reproducibility.

    Raises:
        ConfigError: If the GPU was used before, so that this may come too late.
    """
    import torch

    if _WORKSPACE not in os.environ and torch.cuda.is_initialized():
        raise ConfigError(
            "engine.deterministic=true comes too late: this process has used the GPU already, and "
            f"cuBLAS takes {_WORKSPACE} only before; start a new process, or set "
            f"{_WORKSPACE}=:4096:8 in the environment before the GPU is first used"
        )
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # :16:8 is deterministic too
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # for the flash_attn package
    torch.use_deterministic_algorithms(True)
    # it would only cost time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let BLAS and LAPACK work with one thread: how they share work out shifts rounding."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()

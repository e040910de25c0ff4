"""The same bits again: whatever the number of threads of NumPy and SciPy, and on a GPU if asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

# read by cuBLAS and by the flash_attn package when they are first used
_GPU_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def use_deterministic_kernels() -> None:
    """Let PyTorch take only GPU kernels that add up in a fixed order, in this process from now on.

    It then chooses among its attention kernels by that, and an operation that has none raises a
    `RuntimeError` that names it. On a CPU all that gradsift does adds up in a fixed order anyway.
    Source: PyTorch's notes on reproducibility.
    """
    import torch

    for name, value in _GPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
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

"""How many bytes gradient rows and bases may take, on the device and on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from gradsift.config import Config, EngineConfig
from gradsift.data.encoding import Encoded
from gradsift.gradients.per_example import each_batch
from gradsift.models.batch_size import FEW_TOKENS, fits, run_worst
from gradsift.models.batches import device_of, group_examples, positions_of
from gradsift.models.devices import local_processes

_SPARED = 32  # one part in so many of what is free on a GPU: memory comes in pieces


def host_memory() -> int:
    """Return the bytes that this process may still take, of the machine's or its container's.

    Pinned memory that PyTorch keeps, though nothing is in it any more, is given back first.
    """
    empty_cache = getattr(torch._C, "_host_emptyCache", None)
    if empty_cache and torch.cuda.is_initialized():
        empty_cache()
    available = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{what}" for what in ("max", "current"))
    if limit.exists() and used.exists() and (bound := limit.read_text().strip()) != "max":
        available = min(available, int(bound) - int(used.read_text()))
    return available


def memory_budget(engine: EngineConfig, device: torch.device) -> int:
    """Return how many bytes gradient rows and bases may take on the device.

    `auto`: half of it; of the host's memory half of a share for each process that was begun here.
    """
    if engine.memory != "auto":
        return int(engine.memory)
    sharing = 1 if device.type == "cuda" else local_processes()[1]
    return free_memory(device) // (2 * sharing)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return host_memory()


def basis_memory(config: Config, model: nn.Module, tokens: int, whole: int) -> tuple[int, int]:
    """Return the bytes that a basis may take of the model's device while it is made, and then.

    On a GPU beside a batch of so many `tokens`, which is tried. `whole`: the bytes wanted.
    """
    device = device_of(model)
    budget = memory_budget(config.engine, device)
    if device.type != "cuda":
        return budget, budget
    longest = min(config.data.max_length, positions_of(model) or config.data.max_length)
    batch = _batch_memory(model, longest, max(tokens, longest))
    if batch is None:  # perhaps nothing is as long as may be
        return budget, budget
    return room_for_basis(free_memory(device), batch, whole, config.engine.memory)


def room_for_basis(
    free: int, batch: int, whole: int, bound: int | Literal["auto"] = "auto"
) -> tuple[int, int]:
    """Return how many of the `free` bytes of a GPU a basis may take while it is made, and then.

    All that a batch leaves. If `whole` bytes of basis do not fit into that, it keeps a quarter of
    what is free: larger batches share the copies of what waits in host memory. `bound`:
    engine.memory.
    """
    left = max(0, free - free // _SPARED - batch)
    if bound != "auto":
        return min(int(bound), left), min(int(bound), left)
    return left, left if whole <= left else min(left, free // 4)


def small_batch(engine: EngineConfig) -> int:
    """Return the tokens of a batch beside rows of gradients or a basis: few, unless set."""
    return FEW_TOKENS if engine.batch_tokens == "auto" else engine.batch_tokens


def _batch_memory(model: nn.Module, longest: int, tokens: int) -> int | None:
    """Return the bytes that the worst batch takes while its gradients are formed, by forming them.

    None, if they do not fit.
    """

    def convert(name: str, gradient: Tensor) -> None:
        gradient.float()  # the most that is made of it

    def measure(examples: Sequence[Encoded], max_tokens: int) -> None:
        groups = group_examples(model, examples, max_tokens)
        for _, backpropagate in each_batch(model, examples, groups):
            backpropagate(convert)

    device = device_of(model)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    if not fits(partial(run_worst, measure, np.array([longest])), tokens):
        return None
    taken = torch.cuda.max_memory_allocated(device) - before
    clear_device_cache()  # else what is free lies in pieces
    return taken

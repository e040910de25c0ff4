"""How many bytes gradient rows and bases may take, on the device and on the host."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from gradsift.config import EngineConfig


def host_memory() -> int:
    """Return the bytes that this process may still take, of the machine's or its container's."""
    available = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{what}" for what in ("max", "current"))
    if limit.exists() and used.exists() and (bound := limit.read_text().strip()) != "max":
        available = min(available, int(bound) - int(used.read_text()))
    return available


def memory_budget(engine: EngineConfig, device: torch.device) -> int:
    """Return how many bytes gradient rows and bases may take on the device; `auto`: half of it."""
    if engine.memory != "auto":
        return int(engine.memory)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) // 2
    return host_memory() // 2

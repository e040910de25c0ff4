"""Which executor a run works with."""

from __future__ import annotations

from gradsift.config import EngineConfig
from gradsift.executors.base import Executor
from gradsift.executors.processes import is_distributed


def choose_executor(config: EngineConfig) -> Executor:
    """Return where a run works: as its settings say, or with all processes that torchrun began.

    Raises:
        ConfigError: If Ray is asked for and not installed.
    """
    if config.executor == "ray":
        from gradsift.executors.ray import RayCluster

        return RayCluster.of(config)
    if is_distributed():
        from gradsift.executors.torchrun import Torchrun

        return Torchrun()
    from gradsift.executors.local import Local

    return Local()

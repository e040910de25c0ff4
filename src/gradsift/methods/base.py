"""What a method is: its stages, its measuring and its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.config import Config
from gradsift.errors import ModelError
from gradsift.methods.job import Job
from gradsift.models.identity import identity
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Scores

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Inputs:
    """What all stages of a run begin with; `data` has `pool` and `target.NAME`, in that order."""

    config: Config
    model: str
    data: Mapping[str, Stage]

    @property
    def model_facts(self) -> dict[str, Any]:
        """The base model as it is used."""
        settings = self.config.model.model_dump(
            include={"name", "dtype", "attention", "quantization", "trust_remote_code"}
        )
        return {"identity": self.model} | settings

    def target(self, name: str) -> Stage:
        """Return the stage that encodes a target."""
        return self.data[f"target.{name}"]

    def warmup(self, config: Config, name: str) -> Stage:
        """Return the stage that leaves the adapters of a warm-up in the folder of its name.

        Raises:
            ModelError: If the adapter given is not there.
        """
        settings: dict[str, Any] = {"model": self.model_facts}
        if config.warmup.adapter is not None:
            if not Path(config.warmup.adapter).is_dir():
                raise ModelError(f"no such adapter folder: {config.warmup.adapter!r}")
            return Stage(name, settings | {"adapter": identity(config.warmup.adapter)}, (name,))
        settings |= {"lora": config.lora.model_dump(), "warmup": config.warmup.model_dump()}
        trained_on = (self.data["pool"],) if config.warmup.mode == "train" else ()
        return Stage(name, settings, (name,), trained_on)

    def gradients(self, name: str) -> str:
        """Return what tells a target's gradients from others: those of the adapter and examples."""
        warmup = self.warmup(self.config, "warmup")
        return f"{warmup.fingerprint} {self.target(name).fingerprint}"

    def pool_pass(self, name: str, *sources: Stage, **settings: Any) -> Stage:
        """Return the stage of that name that measures the pool, shard by shard."""
        settings |= self.config.engine.model_dump(include={"window", "shard_size"})
        return Stage(name, settings, (name,), (self.data["pool"], *sources), keeps_parts=True)


def _no_stages(inputs: Inputs) -> Sequence[Stage]:
    return ()


def _nothing(*_: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Method:
    """One way to score a pool against targets.

    `stages`: what it leaves in the run folder, besides scores, in the order of its work.
    `measure`: does what of that is not there yet. `scores`: one `Scores` per target, from what is
    there. `settings`: what else the scores depend on. `facts`: columns for `scores.parquet` that
    it knows of every pool example, whatever the target. `check`: finds out before any work what
    would stop it.
    """

    scores: Callable[[Job], Mapping[str, Scores]]
    stages: Callable[[Inputs], Sequence[Stage]] = _no_stages
    measure: Callable[[Job], object] = _nothing
    settings: Callable[[Config], Mapping[str, Any]] = _nothing
    facts: Callable[[Job], Mapping[str, np.ndarray]] = _nothing
    check: Callable[[Config], object] = _nothing

"""What a method is given: settings, encoded data, models, and the folder that keeps its work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gradsift.config import Config
from gradsift.data.conversations import text_of
from gradsift.data.encoded import EncodedSet
from gradsift.errors import RunError
from gradsift.executors.base import Executor, choose_executor, is_first
from gradsift.methods.base import Inputs
from gradsift.models.checkpoints import read_checkpoints
from gradsift.pool.shards import Shard, Stored, missing_shards, plan_shards
from gradsift.runs.folder import Run
from gradsift.runs.stage import Stage
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from gradsift.models.cache import Models

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One run's data, models and folder, as a method works with them."""

    inputs: Inputs
    folder: Run
    pool: EncodedSet
    targets: Mapping[str, EncodedSet]
    models: Models
    executor: Executor

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return self.inputs.config

    def path(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.folder.path / name

    def warm_up(self, stage: Stage, config: Config) -> list[Checkpoint]:
        """Return the adapters of a warm-up, trained now or before."""
        with self.folder.stage(stage) as todo:
            if todo:
                from gradsift.models.warmup import warm_up

                directory, warmup = self.path(stage.name), config.warmup
                trains = warmup.mode == "train" and warmup.adapter is None
                do = self.train if trains else self.call
                do(partial(warm_up, config, self.models, self.pool, directory), directory)
        return self.checkpoints(stage)

    def call(self, work: Callable[[], T], *outputs: Path) -> T:
        """Do some work where there is a device for it; `outputs` are the paths that it writes.

        Raises:
            GradsiftError: As the work does.
        """
        found = self.executor.call(partial(_do, self.folder, work, outputs))
        self._fetch(outputs)
        return found

    def train(self, work: Callable[[], object], *outputs: Path) -> None:
        """Do some work in all processes that train together; the first of them writes `outputs`.

        Raises:
            GradsiftError: As the work does.
        """
        self.executor.train(partial(_do, self.folder, work, outputs))
        self._fetch(outputs)

    def _fetch(self, outputs: Sequence[Path]) -> None:
        for path in outputs:
            self.folder.fetch(path)

    def pool_stage(
        self, stage: Stage, labels: Sequence[str] = ("",)
    ) -> AbstractContextManager[bool]:
        """Yield whether a pass over the pool is still to do: shards are missing or damaged.

        `labels`: those of the checkpoints at which it measures, if it has any.
        """
        missing: list[Shard] = []
        if not self.folder.find_fault([stage]):
            for label in labels:  # of all, so that all that is damaged is told at once
                shards = self.shards(stage.name, label)
                for shard in shards:
                    if not shard.path.exists():
                        logger.warning("%s is gone and is measured again", shard.path)
                missing += self.missing_shards(shards)
        return self.folder.stage(stage, whole=not missing)

    def shards(self, stage: str, label: str = "") -> list[Shard]:
        """Return the shards of a pass over the pool, at a checkpoint if it has any."""
        directory, size = self.path(stage) / label, self.config.engine.shard_size
        return plan_shards(len(self.pool), size, directory, self.folder.key(stage))

    def missing_shards(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return those that are still to do; damaged ones are removed and count."""
        return missing_shards(shards, self.folder.intact, self.folder.remove)

    def checkpoints(self, stage: Stage) -> list[Checkpoint]:
        """Return the adapters that a warm-up left."""
        return read_checkpoints(self.path(stage.name))

    def stored(self, stage: str, name: str, label: str = "") -> Stored:
        """Return what a pass over the pool left under this name, at a checkpoint if it has any.

        Raises:
            RunError: If shards are missing or damaged.
        """
        try:
            return Stored(self.shards(stage, label), name, self.folder.intact)
        except FileNotFoundError as error:
            raise RunError(
                f"{error}; run `gradsift select` with {self.folder.path} again: it is measured "
                "anew, what is there is kept"
            ) from None

    def texts(
        self, encoded: EncodedSet, rows: Sequence[int] | np.ndarray | None = None
    ) -> list[str]:
        """Return the conversations of pool or target as plain text, without roles."""
        wanted = range(len(encoded)) if rows is None else rows
        conversations = encoded.conversations(wanted, self.config.data.columns)
        return ["\n".join(map(text_of, messages)) for messages in conversations]

    def tasks(self, name: str) -> list[str]:
        """Return the task of each example of a target."""
        return self.targets[name].column("task").to_pylist()


def open_job(inputs: Inputs, folder: Run, models: Models | None = None) -> Job:
    """Return the job of a run whose pool and targets are encoded."""
    from gradsift.models.cache import Models

    directory, config = folder.path / "data", inputs.config
    targets = {
        name: EncodedSet(directory / f"target.{name}.parquet") for name in config.data.targets
    }
    pool = EncodedSet(directory / "pool.parquet")
    executor = choose_executor(config.engine)
    return Job(inputs, folder, pool, targets, models or Models(config.model), executor)


def _do(folder: Run, work: Callable[[], T], outputs: Sequence[Path]) -> T:
    """Do some work, perhaps on another machine that has yet to see what it begins with."""
    folder.fetch_inputs()
    found = work()
    if is_first():
        for path in outputs:
            folder.publish(path)
    return found

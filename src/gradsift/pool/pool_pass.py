"""A pass over the pool: measured shard by shard, by all the workers there are, and read back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import RunError
from gradsift.executors.base import Executor
from gradsift.pool.examples import MeasureFactory
from gradsift.pool.shards import (
    Shard,
    StoredTensor,
    missing_shards,
    plan_shards,
    read_facts,
    shard_size,
)
from gradsift.progress import track
from gradsift.runs.folder import Run
from gradsift.runs.stage import Stage

logger = logging.getLogger(__name__)

FactoriesByCheckpoint = Mapping[str, Callable[[], MeasureFactory]]
"""For each checkpoint's label (empty where there are none), what makes the factory.

It is called here, when that checkpoint is reached; the factory is sent to the workers.
"""


@dataclass(frozen=True)
class PoolPass:
    """What a stage measures of every pool example; `name` is that of the stage and its folder.

    A pass at several checkpoints has a folder of shards for each, by its label; another has one,
    whose label is empty.
    """

    name: str
    pool: EncodedSet
    folder: Run
    executor: Executor
    engine: EngineConfig

    def run(self, stage: Stage, factories: FactoriesByCheckpoint) -> None:
        """Measure what is not stored yet, at each checkpoint in turn.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        with self.open(stage, [*factories]) as todo:
            known: dict[str, int] | None = None
            for label, make_factory in factories.items() if todo else ():
                known = self._measure(make_factory(), label, known)

    @contextmanager
    def open(self, stage: Stage, labels: Sequence[str] = ("",)) -> Iterator[bool]:
        """Yield whether there is something to do: shards are missing or damaged."""
        missing: list[Shard] = []
        if not self.folder.find_fault([stage]):
            for label in labels:  # of all, so that all that is damaged is named at once
                shards = self.shards(label)
                for shard in shards:
                    if not shard.path.exists():
                        logger.warning("%s is gone and is measured again", shard.path)
                missing += self.missing(shards)
        with self.folder.stage(stage, whole=not missing) as todo:
            yield todo

    def shards(self, label: str = "") -> list[Shard]:
        """Return the shards at a checkpoint."""
        size, key = shard_size(self.engine, len(self.pool)), self.folder.key(self.name)
        return plan_shards(len(self.pool), size, self._directory(label), key)

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return those that are still to do; damaged ones are removed and count."""
        return missing_shards(shards, self.folder.intact, self.folder.remove)

    def read(self, name: str, label: str = "") -> StoredTensor:
        """Return what was stored under a name, row by row as asked for.

        Raises:
            RunError: If shards are missing or damaged.
        """
        try:
            return StoredTensor(self.shards(label), name, self.folder.intact)
        except FileNotFoundError as error:
            raise RunError(
                f"{error}; run `gradsift select` with {self.folder.path} again: it is measured "
                "anew, what is there is kept"
            ) from None

    def _directory(self, label: str) -> Path:
        return self.folder.path / self.name / label

    def _num_tokens(self, shards: Sequence[Shard]) -> int:
        lengths = self.pool.column("num_tokens").to_numpy()
        return sum(int(lengths[shard.start : shard.stop].sum()) for shard in shards)

    def _measure(
        self, factory: MeasureFactory, label: str, known: dict[str, int] | None
    ) -> dict[str, int]:
        """Measure what is missing at a checkpoint; return the facts of a shard of it.

        `known`: those of the checkpoint before, where there was one: what fitted there is taken.
        """
        self._directory(label).mkdir(parents=True, exist_ok=True)
        shards = self.shards(label)
        missing = self.missing(shards)
        if not missing:
            return read_facts(shards[-1])
        starts = {shard.start for shard in missing}
        stored = [shard for shard in shards if shard.start not in starts]
        if stored:
            logger.info("%d of %d shards are there already", len(stored), len(shards))
            known = read_facts(stored[-1])
        open_worker = partial(_open_worker, self.pool, self.folder, self.engine, factory, known)
        name, total = f"{self.name}/{label}".rstrip("/"), sum(map(len, missing))
        with track(name, total, tokens=self._num_tokens(missing)) as advance:
            for shard in self.executor.map(open_worker, missing):
                advance(len(shard))
        self.folder.fetch(self._directory(label))
        return read_facts(shards[-1])


def _open_worker(
    pool: EncodedSet,
    folder: Run,
    engine: EngineConfig,
    factory: MeasureFactory,
    known: Mapping[str, int] | None,
) -> Callable[[Iterable[Shard]], Iterator[Shard]]:
    """Return a worker; called in the process that is to measure, where torch may be loaded."""
    from gradsift.pool.worker import Worker

    return Worker(pool, folder, engine, factory, known)

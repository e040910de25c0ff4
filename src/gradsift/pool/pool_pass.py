"""A pass over the pool: measured shard by shard, by all the workers there are, and read back.

Several stages may be measured in one: then a task is the shards of one range of the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.errors import RunError
from gradsift.executors.base import Executor
from gradsift.pool.examples import MeasureFactory
from gradsift.pool.shards import (
    Shard,
    StoredTensor,
    Task,
    missing_shards,
    plan_shards,
    read_facts,
    save_shard,
    shard_size,
)
from gradsift.progress import track
from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.runs.stage import Stage

logger = logging.getLogger(__name__)

FactoriesByCheckpoint = Mapping[str, Callable[[], MeasureFactory]]
"""For each checkpoint's label (empty where there are none), what makes the factory.

It is called here, when that checkpoint is reached; the factory is sent to the workers.
"""
FactoriesOfParts = Mapping[str, Callable[[Sequence[str]], MeasureFactory]]
"""The same for several stages at once: it is told the parts of those that have something to do."""


@dataclass(frozen=True)
class PoolPass:
    """What a stage measures of every pool example; `name` is that of the stage and its folder.

    A pass at several checkpoints has a folder of shards for each, by its label; another has one,
    whose label is empty. `part`: where one measure serves several stages, what this one's tensors
    begin with.
    """

    name: str
    pool: EncodedSet
    folder: Run
    executor: Executor
    engine: EngineConfig
    part: str = ""

    def run(self, stage: Stage, factories: FactoriesByCheckpoint) -> None:
        """Measure what is not stored yet, at each checkpoint in turn.

        Raises:
            NumericsError: Naming the first example of which something is not finite.
        """
        of_parts = {label: lambda _, make=make: make() for label, make in factories.items()}
        run_together([(self, stage)], of_parts)

    @contextmanager
    def open(self, stage: Stage, labels: Sequence[str] = ("",)) -> Iterator[bool]:
        """Yield whether there is something to do: shards are missing or damaged."""
        with self.folder.stage(stage, self.is_whole(stage, labels)) as todo:
            yield todo

    def is_whole(self, stage: Stage, labels: Sequence[str]) -> bool:
        """Return whether no shard of a finished stage is missing; each that is, is named."""
        missing: list[Shard] = []
        if not self.folder.find_fault([stage]):
            for label in labels:  # of all, so that all that is damaged is named at once
                shards = self.shards(label)
                for shard in shards:
                    if not shard.path.exists():
                        logger.warning("%s is gone and is measured again", shard.path)
                missing += self.missing(shards)
        return not missing

    def shards(self, label: str = "") -> list[Shard]:
        """Return the shards at a checkpoint."""
        size, key = shard_size(self.engine, len(self.pool)), self.folder.key(self.name)
        return plan_shards(len(self.pool), size, self.directory(label), key, self.part)

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
            command = "index" if self.name == layout.INDEX else "select"
            raise RunError(
                f"{error}; run `gradsift {command}` with {self.folder.path} again: it is measured "
                "anew, what is there is kept"
            ) from None

    def directory(self, label: str) -> Path:
        """Return where the shards at a checkpoint lie."""
        return self.folder.path / self.name / label


def run_together(passes: Sequence[tuple[PoolPass, Stage]], factories: FactoriesOfParts) -> None:
    """Measure what is not stored yet of some passes over one pool, in one pass.

    Raises:
        NumericsError: Naming the first example of which something is not finite.
    """
    with _open_together(passes, [*factories]) as left:
        known: dict[str, int] | None = None
        for label, make_factory in factories.items() if left else ():
            known = _measure(left, label, make_factory, known)


def store_together(
    passes: Sequence[tuple[PoolPass, Stage]],
    makers: Mapping[str, Callable[[Sequence[str]], Callable[[Shard], Mapping[str, np.ndarray]]]],
) -> None:
    """Store in this process what can be had without measuring, of all that is not stored yet.

    `makers`: for each checkpoint's label, what takes the parts of the passes that have something
    to do, and returns what makes the tensors of a shard's range.
    """
    with _open_together(passes, [*makers]) as left:
        for label, maker in makers.items() if left else ():
            tasks, _ = _plan(left, label)
            if not tasks:
                continue
            make = maker(_parts(left, tasks))
            with track(_title(left, label), sum(len(task[0]) for task in tasks)) as advance:
                for task in tasks:
                    tensors = make(task[0])
                    for shard in task:
                        save_shard(shard, shard.own(tensors))
                        left[0].folder.publish(shard.path)
                    advance(len(task[0]))


@contextmanager
def _open_together(
    passes: Sequence[tuple[PoolPass, Stage]], labels: Sequence[str]
) -> Iterator[list[PoolPass]]:
    """Yield the passes that have something to do."""
    planned = [(stage, own.is_whole(stage, labels)) for own, stage in passes]
    with passes[0][0].folder.stages(planned) as todo:
        yield [own for (own, _), is_to_do in zip(passes, todo, strict=True) if is_to_do]


def _plan(passes: Sequence[PoolPass], label: str) -> tuple[list[Task], list[Shard]]:
    """Return the tasks that are to do at a checkpoint, and the shards that are there already."""
    missing: dict[int, list[Shard]] = {}  # by where in the pool they begin
    planned: list[Shard] = []
    for own in passes:
        own.directory(label).mkdir(parents=True, exist_ok=True)
        shards = own.shards(label)
        planned += shards
        for shard in own.missing(shards):
            missing.setdefault(shard.start, []).append(shard)
    stored = [shard for shard in planned if shard not in missing.get(shard.start, ())]
    return [tuple(missing[start]) for start in sorted(missing)], stored


def _parts(passes: Sequence[PoolPass], tasks: Sequence[Task]) -> list[str]:
    """Return the parts of the passes that have something to do."""
    parts = {shard.part for task in tasks for shard in task}
    return [own.part for own in passes if own.part in parts]


def _measure(
    passes: Sequence[PoolPass],
    label: str,
    make_factory: Callable[[Sequence[str]], MeasureFactory],
    known: dict[str, int] | None,
) -> dict[str, int]:
    """Measure what is missing at a checkpoint; return the facts of a shard of it.

    `known`: those of the checkpoint before, where there was one: what fitted there is taken.
    """
    tasks, stored = _plan(passes, label)
    if not tasks:
        return read_facts(stored[-1])
    if stored:
        num_shards = len(stored) + sum(map(len, tasks))
        logger.info("%d of %d shards are there already", len(stored), num_shards)
        known = read_facts(stored[-1])
    first, factory = passes[0], make_factory(_parts(passes, tasks))
    open_worker = partial(_open_worker, first.pool, first.folder, first.engine, factory, known)
    lengths = first.pool.column("num_tokens").to_numpy()
    tokens = sum(int(lengths[task[0].start : task[0].stop].sum()) for task in tasks)
    total = sum(len(task[0]) for task in tasks)
    with track(_title(passes, label), total, tokens=tokens) as advance:
        for task in first.executor.map(open_worker, tasks):
            advance(len(task[0]))
    for own in passes:
        own.folder.fetch(own.directory(label))
    return read_facts(tasks[-1][-1])


def _title(passes: Sequence[PoolPass], label: str) -> str:
    """Return what a pass is called in the log."""
    name = passes[0].name
    if len(passes) > 1:
        name = f"{PurePosixPath(name).parent} of {len(passes)} targets"
    return f"{name}/{label}".rstrip("/")


def _open_worker(
    pool: EncodedSet,
    folder: Run,
    engine: EngineConfig,
    factory: MeasureFactory,
    known: Mapping[str, int] | None,
) -> Callable[[Iterable[Task]], Iterator[Task]]:
    """Return a worker; called in the process that is to measure, where torch may be loaded."""
    from gradsift.pool.worker import Worker

    return Worker(pool, folder, engine, factory, known)

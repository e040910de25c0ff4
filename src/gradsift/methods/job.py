"""What a method is given: settings, encoded data, models, and the folder that keeps its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gradsift.config import Config, WarmupConfig
from gradsift.data.conversations import text_of
from gradsift.data.encoded import EncodedSet
from gradsift.determinism import use_deterministic_kernels
from gradsift.errors import ModelError
from gradsift.executors.base import Executor
from gradsift.executors.choice import choose_executor
from gradsift.executors.processes import is_first
from gradsift.models.checkpoints import read_checkpoints
from gradsift.models.identity import identity
from gradsift.pool.pool_pass import PoolPass
from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.runs.indexes import AskedIndex
from gradsift.runs.stage import Stage
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from gradsift.models.cache import ModelCache
    from gradsift.models.tracking import Trackers

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """The settings of a run and the stages that methods share; known before any work is done.

    `data_stages`: those that encode the pool and every target, by the name of their set, the pool
    first. `places`: where in the folder a stage is kept that differs from the run's own of that
    name, for what looks at other settings beside the run. `index`: that of the pool which the run
    asks, if any.
    """

    config: Config
    model_identity: str
    data_stages: Mapping[str, Stage]
    places: Mapping[str, str] = field(default_factory=dict)
    index: AskedIndex | None = None

    def at(self, name: str) -> str:
        """Return where a stage, or something beneath it, is kept, given its name in `layout`."""
        for stage, place in self.places.items():
            rest = name.removeprefix(stage)
            if rest != name and rest[:1] in ("", "/", "."):
                return place + rest
        return name

    @property
    def target_names(self) -> Sequence[str]:
        """The names of the targets."""
        return [*self.config.data.targets]

    @property
    def pool_stage(self) -> Stage:
        """The stage that encodes the pool."""
        return self.data_stages[layout.POOL]

    def target_stage(self, name: str) -> Stage:
        """Return the stage that encodes a target."""
        return self.data_stages[layout.target_set(name)]

    def of_target(self, name: str) -> Inputs:
        """Return the same with this target alone."""
        data = self.config.data.model_copy(
            update={"targets": {name: self.config.data.targets[name]}}
        )
        kept = (layout.POOL, layout.target_set(name))
        return replace(
            self,
            config=self.config.model_copy(update={"data": data}),
            data_stages={kind: self.data_stages[kind] for kind in kept},
        )

    @property
    def model_settings(self) -> dict[str, Any]:
        """What identifies the base model as it is used."""
        settings = self.config.model.model_dump(
            include={"name", "dtype", "attention", "quantization", "trust_remote_code"}
        )
        return {"identity": self.model_identity} | settings

    @property
    def warmup_stage(self) -> Stage:
        """The configured warm-up, which stores adapters."""
        return self.make_warmup_stage(self.config.warmup, layout.WARMUP)

    def make_warmup_stage(self, warmup: WarmupConfig, name: str) -> Stage:
        """Return the stage of a warm-up that stores its adapters in the folder of that name.

        Raises:
            ModelError: If the adapter given is not there.
        """
        settings: dict[str, Any] = {"model": self.model_settings}
        name = self.at(name)
        if warmup.adapter is not None:
            if not Path(warmup.adapter).is_dir():
                raise ModelError(f"no such adapter folder: {warmup.adapter!r}")
            return Stage(name, settings | {"adapter": identity(warmup.adapter)}, (name,))
        trained = warmup.model_dump(exclude={"gradient_checkpointing"})  # it changes no result
        settings |= {"lora": self.config.lora.model_dump(), "warmup": trained}
        trained_on = (self.pool_stage,) if warmup.mode == "train" else ()
        return Stage(name, settings, (name,), trained_on)

    def gradients_key(self, target: str) -> str:
        """Return a key of a target's gradients: of their adapter and examples."""
        return f"{self.warmup_stage.fingerprint} {self.target_stage(target).fingerprint}"

    @property
    def asks(self) -> AskedIndex | None:
        """The index, if gradients are measured at the adapters that it was made with."""
        fits = self.index is not None and self.index.warmup == self.warmup_stage.fingerprint
        return self.index if fits else None

    def make_pool_pass_stage(self, name: str, *sources: Stage, **settings: Any) -> Stage:
        """Return the stage of that name that measures the pool, shard by shard."""
        settings |= self.config.engine.model_dump(include={"window", "shard_size"})
        name = self.at(name)
        return Stage(name, settings, (name,), (self.pool_stage, *sources), keeps_parts=True)


@dataclass(frozen=True)
class Job:
    """One run's data, models and folder, as a method works with them."""

    inputs: Inputs
    folder: Run
    pool: EncodedSet
    targets: Mapping[str, EncodedSet]
    models: ModelCache
    executor: Executor

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return self.inputs.config

    def path(self, name: str) -> Path:
        """Return where something of the run folder lies, given its name in `layout`."""
        return self.folder.path / self.inputs.at(name)

    def tasks(self, target: str) -> list[str]:
        """Return the task of each example of a target."""
        return self.targets[target].column("task").to_pylist()

    def texts(
        self, encoded: EncodedSet, rows: Sequence[int] | np.ndarray | None = None
    ) -> list[str]:
        """Return the conversations of pool or target as plain text, without roles."""
        wanted = range(len(encoded)) if rows is None else rows
        conversations = encoded.conversations(wanted, self.config.data.columns)
        return ["\n".join(map(text_of, messages)) for messages in conversations]

    def checkpoints(self, warmup: str = layout.WARMUP) -> list[Checkpoint]:
        """Return the adapters that a warm-up stored, given its name."""
        return read_checkpoints(self.path(warmup))

    def warm_up(self, stage: Stage, warmup: WarmupConfig | None = None) -> list[Checkpoint]:
        """Return the adapters of a warm-up, trained now or before.

        `warmup`: its settings where they are not those of the run.
        """
        warmup = warmup or self.config.warmup
        with self.folder.stage(stage) as todo:
            if todo:
                from gradsift.models.warmup import warm_up

                directory, lora = self.path(stage.name), self.config.lora
                trains = warmup.mode == "train" and warmup.adapter is None
                do = self.train if trains else self.call
                given = (warmup, lora, self.models, self.pool, directory)
                work = partial(warm_up, *given, self.trackers(stage.name))
                do(work, directory)
        return self.checkpoints(stage.name)

    def trackers(self, training: str) -> Trackers:
        """Return where a training is logged besides, given a name for it."""
        from gradsift.models.tracking import Trackers, as_folder_name

        place = self.folder.path / layout.TRACKED / as_folder_name(training)
        return Trackers(self.config.engine.report_to, place)

    def pool_pass(self, name: str, part: str = "") -> PoolPass:
        """Return the pass over the pool that the stage of this name keeps; see `PoolPass`."""
        place, engine = self.inputs.at(name), self.config.engine
        return PoolPass(place, self.pool, self.folder, self.executor, engine, part)

    def call(self, work: Callable[[], T], *outputs: Path) -> T:
        """Do some work where there is a device for it; `outputs` are the paths that it writes.

        Raises:
            GradsiftError: As the work does.
        """
        found = self.executor.call(partial(_fetch_and_do, self.folder, work, outputs))
        self._fetch(outputs)
        return found

    def train(self, work: Callable[[], object], *outputs: Path) -> None:
        """Do some work in all processes that train together; the first of them writes `outputs`.

        Raises:
            GradsiftError: As the work does.
        """
        self.executor.train(partial(_fetch_and_do, self.folder, work, outputs))
        self._fetch(outputs)

    def _fetch(self, outputs: Sequence[Path]) -> None:
        for path in outputs:
            self.folder.fetch(path)


def open_job(inputs: Inputs, folder: Run, models: ModelCache | None = None) -> Job:
    """Return the job of a run whose pool and targets are encoded.

    Raises:
        ConfigError: If its kernels are to be deterministic and the GPU was used before.
    """
    from gradsift.models.cache import ModelCache

    config = inputs.config
    if config.engine.deterministic:
        use_deterministic_kernels()  # before anything here computes on a GPU, encoders too
    pool = EncodedSet(folder.path / layout.encoded(layout.POOL))
    targets = {
        name: EncodedSet(folder.path / layout.encoded(layout.target_set(name)))
        for name in config.data.targets
    }
    executor = choose_executor(config.engine)
    models = models or ModelCache(config.model, config.engine.deterministic)
    return Job(inputs, folder, pool, targets, models, executor)


def _fetch_and_do(folder: Run, work: Callable[[], T], outputs: Sequence[Path]) -> T:
    """Do some work, on another machine after fetching the run's files there."""
    folder.fetch_inputs()
    found = work()
    if is_first():
        for path in outputs:
            folder.publish(path)
    return found

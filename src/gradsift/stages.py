"""All stages of a run, each with everything that its result depends on, known before any work.

What only shifts the rounding (device, batch size) is no input: a run may go on elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.config import Config
from gradsift.data import resolve
from gradsift.errors import ModelError
from gradsift.store import Stage, identity


@dataclass(frozen=True)
class Plan:
    """The stages in the order of their work; `data` has `pool` and `target.NAME`."""

    data: Mapping[str, Stage]
    warmup: Stage
    subspaces: Mapping[str, Stage]
    coordinates: Stage
    scores: Stage
    selections: Mapping[str, Stage]

    @classmethod
    def of(cls, config: Config) -> Plan:
        """Return the stages of a configuration.

        Raises:
            DataError: If a pool or target file is not there.
            ModelError: If the model or adapter is not there.
        """
        model = identity(config.model.name)
        data = _data(config, model)
        warmup = _warmup(config, model, data["pool"])
        subspaces = {
            name: _subspace(config, name, data[f"target.{name}"], warmup)
            for name in config.data.targets
        }
        inputs = {
            "pool": data["pool"].fingerprint,
            "warmup": warmup.fingerprint,
            "targets": {name: stage.fingerprint for name, stage in subspaces.items()},
            "shard_size": config.engine.shard_size,
        }
        coordinates = Stage("coordinates", inputs, ("coordinates",), keeps_parts=True)
        inputs = {"coordinates": coordinates.fingerprint}
        inputs |= config.gist.model_dump(include={"aggregation", "norm_power"})
        scores = Stage("scores", inputs, ("scores.parquet",), cheap=True)
        selections = {name: _selection(config, name, scores) for name in config.data.targets}
        return cls(data, warmup, subspaces, coordinates, scores, selections)

    def __iter__(self) -> Any:
        yield from self.data.values()
        yield self.warmup
        yield from self.subspaces.values()
        yield self.coordinates
        yield self.scores
        yield from self.selections.values()


def data_sets(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the sources of the pool and of every target, by the name of their encoded set."""
    targets = {f"target.{name}": sources for name, sources in config.data.targets.items()}
    return {"pool": config.data.pool} | targets


def _data(config: Config, model: str) -> dict[str, Stage]:
    shared = config.data.model_dump(include={"max_length", "columns", "template"})
    if config.data.template and Path(config.data.template).is_file():
        shared["template_hash"] = hashlib.sha256(
            Path(config.data.template).read_bytes()
        ).hexdigest()
    stages = {}
    for name, specs in data_sets(config).items():
        sources = enumerate(resolve(specs), start=1)  # their order is that of the rows
        files = {f"{number} {source.name}": source.fingerprint() for number, source in sources}
        outputs = (f"data/{name}.parquet", f"data/{name}.rejected.jsonl")
        stages[name] = Stage(
            f"data/{name}", {"files": files, "tokenizer": model} | shared, outputs, cheap=True
        )
    return stages


def _warmup(config: Config, model: str, pool: Stage) -> Stage:
    settings = config.model.model_dump(include={"name", "dtype", "attention", "quantization"})
    inputs: dict[str, Any] = {"model": {"identity": model} | settings}
    if config.warmup.adapter is not None:
        if not Path(config.warmup.adapter).is_dir():
            raise ModelError(f"no such adapter folder: {config.warmup.adapter!r}")
        inputs["adapter"] = identity(config.warmup.adapter)
    else:
        inputs |= {"lora": config.lora.model_dump(), "warmup": config.warmup.model_dump()}
        if config.warmup.mode == "train":
            inputs["pool"] = pool.fingerprint
    return Stage("warmup", inputs, ("warmup",))


def _subspace(config: Config, name: str, data: Stage, warmup: Stage) -> Stage:
    inputs = {
        "data": data.fingerprint,
        "warmup": warmup.fingerprint,
        "rank": config.gist.rank,
    }
    return Stage(f"targets/{name}", inputs, (f"targets/{name}",))


def _selection(config: Config, name: str, scores: Stage) -> Stage:
    inputs = {"scores": scores.fingerprint} | config.policy.model_dump()
    outputs = tuple(f"selected/{name}{end}" for end in (".jsonl", ".parquet", ".refused.parquet"))
    return Stage(f"selected/{name}", inputs, outputs, cheap=True)

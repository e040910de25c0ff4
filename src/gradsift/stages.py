"""All stages of a run, each with everything that its result depends on, known before any work.

What only shifts the rounding (device, batch size) is no input: a run may go on elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradsift.config import Config
from gradsift.data import resolve
from gradsift.job import Inputs
from gradsift.methods import METHODS
from gradsift.store import Stage, identity


@dataclass(frozen=True)
class Plan:
    """The stages in the order of their work: encoding, the method's own, scores, picks."""

    inputs: Inputs
    measured: tuple[Stage, ...]
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
        inputs = Inputs(config, model, encoding_stages(config, model, data_sets(config)))
        method = METHODS[config.method]
        measured = tuple(method.stages(inputs))
        name, settings = scores_file(config.method), method.settings(config)
        scores = Stage(
            name.removesuffix(".parquet"),
            {"method": config.method, **settings},
            (name,),
            (*inputs.data.values(), *measured),
            cheap=True,
        )
        selections = {name: _selection(inputs, name, scores) for name in config.data.targets}
        return cls(inputs, measured, scores, selections)

    def __iter__(self) -> Iterator[Stage]:
        yield from self.inputs.data.values()
        yield from self.measured
        yield self.scores
        yield from self.selections.values()


def scores_file(method: str) -> str:
    """Return where in a run folder the scores of a method lie."""
    return f"scores/{method}.parquet"


def data_sets(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the sources of the pool and of every target, by the name of their encoded set."""
    targets = {f"target.{name}": sources for name, sources in config.data.targets.items()}
    return {"pool": config.data.pool} | targets


def encoding_stages(
    config: Config, model: str, sets: Mapping[str, tuple[str, ...]], folder: str = "data"
) -> dict[str, Stage]:
    """Return the stages that encode some sets of sources into a folder.

    Raises:
        DataError: If a file is not there.
    """
    shared = config.data.model_dump(include={"max_length", "columns", "template"})
    shared["trust_remote_code"] = config.model.trust_remote_code  # of the tokenizer
    if config.data.template and Path(config.data.template).is_file():
        shared["template_hash"] = hashlib.sha256(
            Path(config.data.template).read_bytes()
        ).hexdigest()
    stages = {}
    for name, specs in sets.items():
        sources = enumerate(resolve(specs), start=1)  # their order is that of the rows
        files = {f"{number} {source.name}": source.fingerprint() for number, source in sources}
        outputs = (f"{folder}/{name}.parquet", f"{folder}/{name}.rejected.jsonl")
        settings = {"files": files, "tokenizer": model} | shared
        stages[name] = Stage(f"{folder}/{name}", settings, outputs, cheap=True)
    return stages


def _selection(inputs: Inputs, name: str, scores: Stage) -> Stage:
    settings = {"method": inputs.config.method} | inputs.config.policy.model_dump()
    outputs = tuple(f"selected/{name}{end}" for end in (".jsonl", ".parquet", ".refused.parquet"))
    sources = (scores, inputs.data["pool"], inputs.target(name))
    return Stage(f"selected/{name}", settings, outputs, sources, cheap=True)

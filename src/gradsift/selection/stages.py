"""All stages of a run, each with everything that its result depends on, known before any work.

What only shifts the rounding (device, batch size) is no input: a run may go on elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gradsift.config import Config
from gradsift.data.stages import data_sets, encoding_stages
from gradsift.methods.base import Inputs
from gradsift.methods.registry import METHODS
from gradsift.models.identity import identity
from gradsift.runs.layout import scores_file
from gradsift.runs.stage import Stage


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


def _selection(inputs: Inputs, name: str, scores: Stage) -> Stage:
    settings = {"method": inputs.config.method} | inputs.config.policy.model_dump()
    outputs = tuple(f"selected/{name}{end}" for end in (".jsonl", ".parquet", ".refused.parquet"))
    sources = (scores, inputs.data["pool"], inputs.target(name))
    return Stage(f"selected/{name}", settings, outputs, sources, cheap=True)

"""All stages of a run, each with everything that its result depends on, known before any work.

What only shifts the rounding (device, batch size) is no input: a run may go on elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gradsift.config import Config, PolicyConfig
from gradsift.data.sets import data_sets, encoding_stages
from gradsift.methods.job import Inputs
from gradsift.methods.registry import METHODS
from gradsift.models.identity import identity
from gradsift.runs import layout
from gradsift.runs.indexes import AskedIndex, ask_index
from gradsift.runs.stage import Stage
from gradsift.selection.picks import FILES_VERSION


@dataclass(frozen=True)
class RunStages:
    """The stages in the order of their work: encoding, the method's own, scores, picks."""

    inputs: Inputs
    measured: tuple[Stage, ...]
    scores: Stage
    selections: Mapping[str, Stage]

    @classmethod
    def of(cls, config: Config, index: AskedIndex | None = None) -> RunStages:
        """Return the stages of a configuration; `index`: that which it asks, if it is at hand.

        Raises:
            DataError: If a pool or target file is not there; an index has its pool.
            ModelError: If the model or adapter is not there.
            RunError: If the index is not there.
        """
        model, stages = identity(config.model.name), dict[str, Stage]()
        sets, trusted = data_sets(config.data), config.model.trust_remote_code
        if config.index.path is not None:
            index = index or ask_index(config.index.path)
            stages[layout.POOL] = index.pool
            del sets[layout.POOL]
        stages |= encoding_stages(config.data, model, trusted, sets)
        return cls.of_inputs(Inputs(config, model, stages, index=index))

    @classmethod
    def of_inputs(cls, inputs: Inputs) -> RunStages:
        """Return the stages that work with some encoded sets."""
        config = inputs.config
        method = METHODS[config.method]
        measured = tuple(method.stages(inputs))
        scores = Stage(
            inputs.at(layout.scoring(config.method)),
            {"method": config.method, **method.settings(config)},
            (inputs.at(layout.scores(config.method)),),
            (*inputs.data_stages.values(), *measured),
            cheap=True,
        )
        selections = {name: _selection(inputs, name) for name in config.data.targets}
        return cls(inputs, measured, scores, selections)

    def beside(self, inputs: Inputs, folder: str) -> RunStages:
        """Return the stages of other inputs, those that differ from these kept in a folder.

        There each has a folder of its own, named by its fingerprint: what several others have in
        common is kept once.
        """
        here = {stage.name: stage.fingerprint for stage in (*self.measured, self.scores)}
        plain = RunStages.of_inputs(replace(inputs, places={}))
        places = {
            stage.name: f"{folder}/{stage.fingerprint}/{stage.name}"
            for stage in (*plain.measured, plain.scores)
            if here.get(stage.name) != stage.fingerprint
        }
        return RunStages.of_inputs(replace(inputs, places=places))

    def with_policy(self, policy: PolicyConfig) -> RunStages:
        """Return the same stages, but for the picks: those of another policy."""
        config = self.inputs.config.model_copy(update={"policy": policy})
        inputs = replace(self.inputs, config=config)
        names = config.data.targets
        return replace(
            self, inputs=inputs, selections={name: _selection(inputs, name) for name in names}
        )

    def __iter__(self) -> Iterator[Stage]:
        yield from self.inputs.data_stages.values()
        yield from self.measured
        yield self.scores
        yield from self.selections.values()


def scored_by(inputs: Inputs, target: str) -> tuple[dict[str, Any], tuple[Stage, ...]]:
    """Return what a target's scores depend on, whatever other targets there are.

    The settings of the method, and the stages that it reads.
    """
    own, method = inputs.of_target(target), METHODS[inputs.config.method]
    settings = {"method": inputs.config.method, "scores": dict(method.settings(inputs.config))}
    return settings, (*own.data_stages.values(), *method.stages(own))


def _selection(inputs: Inputs, target: str) -> Stage:
    policy = inputs.config.policy
    key = policy.selection_of(target)
    settings, sources = scored_by(inputs, target)
    settings |= policy.model_dump(exclude={"name"}) | {"version": FILES_VERSION}
    names = (layout.picks, layout.messages, layout.reasons, layout.refusals)
    outputs = tuple(name(key) for name in names)
    return Stage(layout.selection(key), settings, outputs, sources, cheap=True)

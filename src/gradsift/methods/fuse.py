"""Fusion: other methods' rankings joined, a hedge against picking the wrong one.

Reciprocal rank fusion (Cormack, Clarke, Büttcher, 2009, doi 10.1145/1571941.1572114): with rank_m
the place of an example in the ranking by method m, the best being 1,

    score = Σ_m 1 / (60 + rank_m)

Ranks alone count, so that scores in any unit can be joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from gradsift.config import Config
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.work import Sizes, Work
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Ranking

_SHARED = ("training", "forward")  # kinds of work
_OFFSET = 60  # the authors' constant: the larger, the less a first place counts

Methods = Mapping[str, Method]


def make_method(methods: Methods) -> Method:
    """Return the fusion of those of some methods that `fuse.methods` names."""
    return Method(
        scores=partial(scores, methods),
        stages=partial(stages, methods),
        measure=partial(measure, methods),
        settings=partial(settings, methods),
        facts=partial(facts, methods),
        check=partial(check, methods),
        compares=False,
        work=partial(work, methods),
    )


def stages(methods: Methods, inputs: Inputs) -> tuple[Stage, ...]:
    """Return the stages of all methods, those that they share once."""
    found: dict[str, Stage] = {}
    for name, method in _fused(methods, inputs.config):
        own = replace(inputs, config=_by(name, inputs.config))
        found |= {stage.name: stage for stage in method.stages(own)}
    return tuple(found.values())


def measure(methods: Methods, job: Job) -> None:
    """Do what the methods have not done yet, one after the other.

    Raises:
        GradsiftError: As they do.
    """
    for name, method in _fused(methods, job.config):
        method.measure(_job_by(name, job))


def scores(methods: Methods, job: Job) -> dict[str, Ranking]:
    """Return the sums of reciprocal ranks."""
    values: dict[str, list[np.ndarray]] = {name: [] for name in job.targets}
    for name, method in _fused(methods, job.config):
        for target, found in method.scores(_job_by(name, job)).items():
            values[target].append(found.scores()[0])
    return {target: Ranking(fuse_ranks(found)) for target, found in values.items()}


def settings(methods: Methods, config: Config) -> Mapping[str, Any]:
    """Return what is fused, and what the scores of each depend on."""
    return {
        name: dict(method.settings(_by(name, config))) for name, method in _fused(methods, config)
    }


def facts(methods: Methods, job: Job) -> Mapping[str, np.ndarray]:
    """Return what the first of the methods knows that knows something of every pool example."""
    for name, method in _fused(methods, job.config):
        if found := method.facts(_job_by(name, job)):
            return found
    return {}


def check(methods: Methods, config: Config) -> None:
    """Find out whether one of the methods would be stopped.

    Raises:
        ConfigError: As they do.
    """
    for name, method in _fused(methods, config):
        method.check(_by(name, config))


def work(methods: Methods, config: Config, sizes: Sizes) -> list[Work]:
    """Return the work of all methods, what they share once: warm-up, and passes without gradients.

    Passes with gradients are each method's own, however equal their counts.
    """
    found: list[Work] = []
    for name, method in _fused(methods, config):
        for piece in method.work(_by(name, config), sizes):
            if piece.kind not in _SHARED or piece not in found:
                found.append(piece)
    return found


def fuse_ranks(scores: Sequence[Float[np.ndarray, " example"]]) -> Float[np.ndarray, " example"]:
    """Return Σ 1 / (60 + rank) over some scores of the same examples, higher being better.

    Examples of equal score share the mean of their ranks, so that their order does not count.

    >>> fuse_ranks([np.array([5.0, 1.0, 1.0])]).tolist() == [1 / 61, 1 / 62.5, 1 / 62.5]
    True
    """
    terms = np.stack([1 / (_OFFSET + _ranks(values)) for values in scores])
    return np.sort(terms, axis=0).sum(axis=0)  # in a fixed order: the same terms, the same sum


def _ranks(scores: Float[np.ndarray, " example"]) -> Float[np.ndarray, " example"]:
    from scipy.stats import rankdata

    return rankdata(-scores, method="average")


def _fused(methods: Methods, config: Config) -> Iterator[tuple[str, Method]]:
    return ((name, methods[name]) for name in config.fuse.methods)


def _by(name: str, config: Config) -> Config:
    """Return the settings with another method."""
    return config.model_copy(update={"method": name})


def _job_by(name: str, job: Job) -> Job:
    return replace(job, inputs=replace(job.inputs, config=_by(name, job.config)))

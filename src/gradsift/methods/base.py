"""What a method is: its stages, its measuring and its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradsift.config import Config
from gradsift.methods.job import Inputs, Job
from gradsift.methods.work import Sizes, Work
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Scores


def _no_stages(inputs: Inputs) -> Sequence[Stage]:
    return ()


def _no_work(config: Config, sizes: Sizes) -> Sequence[Work]:
    return ()


def _nothing(*_: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Method:
    """One way to score a pool against targets.

    `stages`: what it stores in the run folder, besides scores, in the order of its work.
    `measure`: does what of that is not there yet. `scores`: one `Scores` per target, from what is
    there. `settings`: what else the scores depend on. `facts`: columns for the table of scores that
    it knows of every pool example, whatever the target. `check`: finds out before any work what
    would stop it. `compares`: whether it compares with target examples, each of which may then pick
    in turn. `work`: what it has the base model do. `reads_index`: whether it can read what it needs
    of the pool out of an index.
    """

    scores: Callable[[Job], Mapping[str, Scores]]
    stages: Callable[[Inputs], Sequence[Stage]] = _no_stages
    measure: Callable[[Job], object] = _nothing
    settings: Callable[[Config], Mapping[str, Any]] = _nothing
    facts: Callable[[Job], Mapping[str, np.ndarray]] = _nothing
    check: Callable[[Config], object] = _nothing
    compares: bool = True
    work: Callable[[Config, Sizes], Sequence[Work]] = _no_work
    reads_index: bool = False

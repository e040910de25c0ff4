"""What each method foretells of fine-tunings on random subsets, for every held-out example.

Held-out examples take the place of target examples: a method is asked how alike each pool example
is with each of them, and what it foretells for a subset is the sum over the subset.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from gradsift.evaluation.fine_tunings import FineTuning, HeldOut
from gradsift.evaluation.grid import Contender
from gradsift.methods.job import Job
from gradsift.methods.registry import METHODS
from gradsift.pipeline import measure
from gradsift.runs import layout
from gradsift.runs.stage import Stage
from gradsift.scores.ranking import Scores
from gradsift.selection.stages import RunStages

logger = logging.getLogger(__name__)

Predictions = Mapping[tuple[str, str], Float[np.ndarray, "subset example"]]
_ROWS_AT_ONCE = 4096


def stages_for_held_out(
    contender: Contender, run: RunStages, tests: Mapping[str, Stage]
) -> RunStages | None:
    """Return the stages of a method with held-out examples in place of its targets.

    `tests`: the stages that encode them, by target. None: the method compares with no example.
    """
    own = contender.stages[0].inputs
    if not METHODS[contender.method].compares:
        return None
    sets = {layout.POOL: own.pool_stage}
    sets |= {layout.target_set(name): stage for name, stage in tests.items()}
    targets = {name: own.config.data.targets[name] for name in tests}
    data = own.config.data.model_copy(update={"targets": targets})
    inputs = replace(own, config=own.config.model_copy(update={"data": data}), data_stages=sets)
    plain = run.inputs.config.model_copy(update={"method": contender.method})
    main = RunStages.of_inputs(replace(run.inputs, config=plain))
    return main.beside(inputs, layout.MEASURED)


def predict(
    job: Job,
    stages: Mapping[str, RunStages],
    tests: Mapping[str, HeldOut],
    subsets: Sequence[FineTuning],
) -> Predictions:
    """Measure the held-out examples by each method, and return sums over the subsets.

    `stages`: as `stages_for_held_out`, by the name of the contender.
    """
    member = np.zeros((len(subsets), len(job.pool)), np.float32)
    for number, subset in enumerate(subsets):
        member[number, list(subset.rows)] = 1
    targets = {name: test.examples for name, test in tests.items()}
    found = {}
    for name, own in stages.items():
        logger.info("%s, with held-out examples in place of the targets", name)
        asked = replace(job, inputs=own.inputs, targets=targets)
        for target, scores in measure(asked, own)().items():
            found[target, name] = _sums(scores, member)
    return found


def _sums(
    scores: Scores, member: Float[np.ndarray, "subset example"]
) -> Float[np.ndarray, "subset held_out"]:
    """Return the sums over each subset of the similarity with each held-out example.

    One that a method cannot compare with is foretold nothing.
    """
    total = 0.0
    for start in range(0, member.shape[1], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        alike = scores.with_examples(rows)
        assert alike is not None, "a method that compares"
        total += member[:, rows].astype(np.float64) @ np.where(np.isfinite(alike), alike, 0)
    return np.asarray(total)

"""The linear datamodeling score: do a method's scores add up to what training on them does?

Fine-tunings on random subsets of the pool; for each method, Spearman's correlation over the subsets
of the sum of its scores with how low the held-out loss is after training on that subset (Park et
al., 2023, arXiv 2303.14186). No selection has to be any good for it to tell methods apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gradsift.evaluation.config import FineTuningConfig, LdsConfig
from gradsift.evaluation.fine_tunings import FineTuning
from gradsift.evaluation.statistics import Interval, rank_correlation


@dataclass(frozen=True)
class LinearDatamodelingScore:
    """What a method's scores are worth for a target; positive: higher sums, lower losses."""

    target: str
    method: str
    correlation: Interval


def subset_fine_tunings(
    num_pool: int, lds: LdsConfig, training: FineTuningConfig
) -> list[FineTuning]:
    """Return the fine-tunings on random subsets, of the same steps, seed and first weights."""
    rng = np.random.default_rng(lds.seed)
    count = min(lds.sample or num_pool, num_pool)
    sample = rng.choice(num_pool, size=count, replace=False)
    size = max(1, round(lds.share * count))
    subsets = [rng.choice(sample, size=size, replace=False) for _ in range(lds.subsets)]
    return [
        FineTuning(tuple(np.sort(rows).tolist()), training.steps, lds.seed, f"subset {number}")
        for number, rows in enumerate(subsets, start=1)
    ]


def linear_datamodeling_scores(
    tunings: Sequence[FineTuning],
    losses: Mapping[str, Sequence[float]],
    scores: Mapping[tuple[str, str], Float[np.ndarray, " example"]],
) -> list[LinearDatamodelingScore]:
    """Return the score of every target and method.

    `losses`: by target, of each fine-tuning; `scores`: of the whole pool, by target and method.
    """
    result = []
    for (target, method), values in scores.items():
        sums = np.array([values[list(tuning.rows)].sum(dtype=np.float64) for tuning in tunings])
        found = rank_correlation(sums, -np.asarray(losses[target], np.float64))
        result.append(LinearDatamodelingScore(target, method, found))
    return result

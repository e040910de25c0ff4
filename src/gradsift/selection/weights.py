"""How much each pick is to count in a weighted fine-tuning; those of a selection have mean 1."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from gradsift.policy_config import WeightKind


def pick_weights(
    scores: Float[np.ndarray, " pick"], kind: WeightKind, temperature: float
) -> Float[np.ndarray, " pick"]:
    """Return a weight for each pick, whose scores are in the order of the picks.

    `rank`: falling by equal steps from the first pick to the last. `softmax`: of scores in standard
    deviations of the picks' own, over the temperature, so that one temperature serves all methods.

    >>> pick_weights(np.array([0.9, 0.5, 0.4]), "rank", 1.0).tolist()
    [1.5, 1.0, 0.5]
    >>> pick_weights(np.array([0.9, 0.5, 0.4]), "softmax", 1.0).round(2).tolist()
    [2.39, 0.38, 0.24]
    """
    count, spread = len(scores), float(np.std(scores)) if len(scores) else 0.0
    if kind == "rank":
        return 2 * np.arange(count, 0, -1) / (count + 1)
    if kind == "softmax" and spread > 0:
        unscaled = np.exp((scores - scores.max()) / (temperature * spread))
        return unscaled / unscaled.mean()
    return np.ones(count)

"""How much two selections share, and how far two methods agree on the whole pool."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from gradsift.evaluation.statistics import correlation, ranks
from gradsift.selection.picks import jaccard


@dataclass(frozen=True)
class Overlap:
    """Two selections: `jaccard` of the picks, `agreement` (Spearman) of the scores of the pool."""

    target: str
    method: str
    other_target: str
    other_method: str
    jaccard: float
    agreement: float


def overlaps(
    picks: Mapping[tuple[str, str], Collection[int]],
    scores: Mapping[tuple[str, str], Float[np.ndarray, " example"]],
) -> Iterator[Overlap]:
    """Yield every two selections, by target and method."""
    ranked = {key: ranks(scores[key][None]) for key in picks}
    for one, other in combinations(picks, 2):
        agreement = float(correlation(ranked[one], ranked[other])[0])
        yield Overlap(*one, *other, jaccard(picks[one], picks[other]), agreement)

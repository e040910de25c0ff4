"""The subspace that a target's gradients span, from their Gram matrix alone.

With G = U S Vᵀ the rows of target gradients, `G Gᵀ = U S² Uᵀ` is only target × target and gives U
and S; the basis V = Gᵀ U S⁻¹ is then a combination of the rows of G, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from gradsift.determinism import one_thread
from gradsift.errors import NumericsError
from gradsift.runs.atomic import write_atomically
from gradsift.sections import parse_share

SMALL_TARGET = 16
"""`auto` keeps the full rank for targets of at most this many examples."""


AUTO_SHARE = "95%"


# a direction whose singular value is below this share of the largest is rounding, not signal
_NOISE_FLOOR = {"float32": 1e-6, "tf32": 1e-2, "bfloat16": 1e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Subspace:
    """One target's subspace at one checkpoint.

    `combination` = U_k/σ_k turns the target's gradient rows into the basis; `coordinates` = U_k σ_k
    are those of the target examples; `singular_values` are all, not only the `rank` kept; `span`
    of them are above rounding.
    """

    combination: Float[np.ndarray, "query rank"]
    coordinates: Float[np.ndarray, "query rank"]
    singular_values: Float[np.ndarray, " query"]
    span: int

    @property
    def rank(self) -> int:
        """How many directions are kept."""
        return self.coordinates.shape[1]


def fit_subspace(
    gram: Float[np.ndarray, "query query"],
    rank: int | str,
    dtype: str = "float32",
    which: str = "leading",
) -> Subspace:
    """Return the leading directions of the rows whose Gram matrix is given (float64).

    Or, for `which="tail"`, those that the rank leaves out: what the leading ones are worth shows
    in how much worse these do.

    `rank` is a count, `full`, a share of the variance such as `95%`, or `auto`: 95 %, and the full
    rank for up to 16 examples (Min et al., 2026, arXiv 2602.18584). Directions at the level of
    rounding in `dtype` gradients are never kept. A direction's sign is fixed by its largest entry.

    >>> fit_subspace(np.diag([9.0, 4.0, 1.0]), "90%").rank
    2

    Raises:
        NumericsError: If an entry is not finite, all gradients are zero, `rank` is more than the
            rows span, or it leaves no tail.
    """
    if not np.isfinite(gram).all():
        raise NumericsError("a target gradient is not finite")
    with one_thread():
        variances, directions = np.linalg.eigh(gram)
    sigma = np.sqrt(np.clip(variances[::-1], 0, None))
    directions = directions[:, ::-1]
    if sigma[0] == 0:
        raise NumericsError(
            "every target gradient is zero: the model already predicts the target with certainty"
        )
    span = count_above_rounding(sigma, dtype)
    kept = choose_rank(sigma, span, rank)
    if which == "tail" and kept == span:
        raise NumericsError(
            f"rank {rank!r} keeps all {span} directions that the target gradients span and leaves "
            "no tail; set gist.rank to fewer, or give more target examples"
        )
    chosen = slice(kept, span) if which == "tail" else slice(kept)
    left, sigma_k = directions[:, chosen], sigma[chosen]
    largest = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
    left = left * np.sign(largest)
    left[np.diag(gram) == 0] = 0  # no gradient, no direction: not even one of rounding
    return Subspace(left / sigma_k, left * sigma_k, sigma, span)


def count_above_rounding(sigma: Float[np.ndarray, " query"], dtype: str) -> int:
    """Return how many singular values, the largest first, are not rounding of `dtype` gradients."""
    return int((sigma > sigma[0] * _NOISE_FLOOR[dtype]).sum())


def choose_rank(sigma: Float[np.ndarray, " query"], span: int, rank: int | str) -> int:
    """Return how many of the `span` directions above rounding to keep.

    Raises:
        NumericsError: If a count above `span` is asked for.
    """
    if isinstance(rank, int):
        if rank > span:
            raise NumericsError(
                f"asked for rank {rank}, but {len(sigma)} target gradients span {span} "
                f"directions; set gist.rank to at most {span}"
            )
        return rank
    if rank == "full" or (rank == "auto" and len(sigma) <= SMALL_TARGET):
        return span
    share = float(parse_share(AUTO_SHARE if rank == "auto" else rank))
    return min(span, rank_of_share(sigma, share))


def rank_of_share(sigma: Float[np.ndarray, " query"], share: float) -> int:
    """Return the smallest k whose Σ σ² is at least the share of the total.

    >>> rank_of_share(np.array([3.0, 2.0, 1.0]), 0.95)
    3
    """
    cumulative = np.cumsum(sigma**2)
    enough = cumulative >= share * cumulative[-1] * (1 - 1e-12)
    return int(enough.argmax()) + 1


def describe(subspace: Subspace) -> dict[str, Any]:
    """Return rank and spectrum as plain values: how many directions hold how much variance."""
    sigma = subspace.singular_values
    return {
        "num_examples": len(sigma),
        "rank": subspace.rank,
        "span": subspace.span,
        "r95": rank_of_share(sigma, 0.95),
        "r99": rank_of_share(sigma, 0.99),
        "singular_values": sigma.tolist(),
        "cumulative_variance": (np.cumsum(sigma**2) / (sigma**2).sum()).tolist(),
    }


def save_subspace(subspace: Subspace, gram: Float[np.ndarray, "query query"], path: Path) -> None:
    """Keep a subspace, and the Gram matrix from which any other rank can be fitted."""
    tensors = {
        "gram": gram,
        "span": np.array([subspace.span]),
        "combination": np.ascontiguousarray(subspace.combination),
        "coordinates": np.ascontiguousarray(subspace.coordinates),
        "singular_values": np.ascontiguousarray(subspace.singular_values),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def load_subspace(path: Path) -> Subspace:
    """Return a stored subspace."""
    tensors = load_file(path)
    parts = (tensors[key] for key in ("combination", "coordinates", "singular_values"))
    return Subspace(*parts, span=int(tensors["span"][0]))


def load_gram(path: Path) -> Float[np.ndarray, "query query"]:
    """Return the Gram matrix that was stored with a subspace."""
    return load_file(path)["gram"]

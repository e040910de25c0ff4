"""The inverse of the empirical Fisher matrix of LoRA gradients, from a Gram matrix alone.

With S (sample × parameter) the gradients of N pool examples and F = SᵀS/N + λI, Woodbury's identity
makes F⁻¹q = (q − Sᵀ (NλI + SSᵀ)⁻¹ S q)/λ for a target gradient q: a combination of the rows of
target and sample. All couplings between parameters are in it, those of different layers too, and
nothing of size parameter × parameter is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from gradsift.determinism import one_thread
from gradsift.errors import NumericsError
from gradsift.gradients.subspace import count_above_rounding
from gradsift.runs.atomic import write_atomically


@dataclass(frozen=True)
class Curvature:
    """Inner products of target gradients, the first rows, and of the N of the sample after them.

    `mean_square` is the mean eigenvalue of SSᵀ on the span of the sample: N times that of SᵀS/N.
    """

    gram: Float[np.ndarray, "row row"]
    num_samples: int
    mean_square: float

    def solve(
        self, damping: float
    ) -> tuple[Float[np.ndarray, "row query"], Float[np.ndarray, "query query"]]:
        """Return combinations of the rows that make F⁻¹q of every target gradient at length 1.

        And the inner products of λF⁻¹q, at their own lengths. λ is `damping` times the mean
        eigenvalue of SᵀS/N on its span. A target gradient of zero stays zero.
        """
        count = len(self.gram) - self.num_samples
        across, within = self.gram[count:, :count], self.gram[count:, count:].copy()
        within[np.diag_indices_from(within)] += damping * self.mean_square
        with one_thread():
            combination = np.concatenate([np.eye(count), -np.linalg.solve(within, across)])
            products = combination.T @ self.gram @ combination
        lengths = np.sqrt(np.clip(np.diag(products), 0, None))
        combination[:, lengths == 0] = 0
        return combination / np.where(lengths > 0, lengths, 1), (products + products.T) / 2


def measure_curvature(
    gram: Float[np.ndarray, "row row"], num_samples: int, dtype: str
) -> Curvature:
    """Return the curvature of which the last rows of a Gram matrix are the sample.

    Eigenvalues at the level of rounding in `dtype` gradients are no part of the mean.

    Raises:
        NumericsError: If every gradient of the sample is zero.
    """
    with one_thread():
        squares = np.linalg.eigvalsh(gram[-num_samples:, -num_samples:])[::-1]
    if squares[0] <= 0:
        raise NumericsError(
            f"every gradient of the {num_samples} pool examples drawn is zero: the model predicts "
            "them with certainty; raise influence.samples, or use another --method"
        )
    span = count_above_rounding(np.sqrt(np.clip(squares, 0, None)), dtype)
    return Curvature(gram, num_samples, float(squares[:span].mean()))


def save_curvature(curvature: Curvature, path: Path) -> None:
    """Keep a curvature, from which the directions under any damping follow."""
    tensors = {
        "gram": np.ascontiguousarray(curvature.gram),
        "num_samples": np.array([curvature.num_samples]),
        "mean_square": np.array([curvature.mean_square]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def load_curvature(path: Path) -> Curvature:
    """Return a stored curvature."""
    tensors = load_file(path)
    return Curvature(
        tensors["gram"], int(tensors["num_samples"][0]), float(tensors["mean_square"][0])
    )

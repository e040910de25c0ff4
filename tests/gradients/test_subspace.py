from __future__ import annotations

import numpy as np
import pytest

from gradsift.errors import NumericsError
from gradsift.gradients.subspace import fit_subspace, rank_of_share


def rows(count: int, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


def test_basis_and_coordinates_are_those_of_the_svd() -> None:
    g = rows(20)
    subspace = fit_subspace(g @ g.T, "80%")
    _, sigma, right = np.linalg.svd(g, full_matrices=False)
    basis = g.T @ subspace.combination
    k = subspace.rank
    assert k == rank_of_share(sigma, 0.8)
    np.testing.assert_allclose(subspace.singular_values, sigma, rtol=1e-9)
    np.testing.assert_allclose(basis.T @ basis, np.eye(k), atol=1e-9)
    np.testing.assert_allclose(np.abs(basis.T @ right[:k].T), np.eye(k), atol=1e-8)
    np.testing.assert_allclose(g @ basis, subspace.coordinates, atol=1e-9)


def test_the_rank_rule() -> None:
    small, large = rows(16), rows(17)
    assert fit_subspace(small @ small.T, "auto").rank == 16
    assert fit_subspace(small @ small.T, "50%").rank < 16
    sigma = np.linalg.svd(large, compute_uv=False)
    assert fit_subspace(large @ large.T, "auto").rank == rank_of_share(sigma, 0.95) < 17
    assert fit_subspace(large @ large.T, 3).rank == 3
    assert fit_subspace(large @ large.T, "full").rank == 17


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-7), ("bfloat16", 3e-3)])
def test_directions_lost_in_rounding_are_never_kept(dtype: str, noise: float) -> None:
    g = rows(9)
    g = np.concatenate([g, g])  # duplicates, but for rounding
    g = g + noise * np.abs(g).max() / 50 * rows(18, seed=1)
    assert fit_subspace(g @ g.T, "full", dtype).rank == 9
    with pytest.raises(NumericsError) as error:
        fit_subspace(g @ g.T, 12, dtype)
    assert str(error.value) == (
        "asked for rank 12, but 18 target gradients span 9 directions; set gist.rank to at most 9"
    )


def test_one_example_and_zero_rows() -> None:
    g = rows(1)
    assert fit_subspace(g @ g.T, "auto").rank == 1
    g = np.concatenate([rows(3), np.zeros((2, 50))])
    subspace = fit_subspace(g @ g.T, "auto")
    assert subspace.rank == 3
    assert (subspace.coordinates[3:] == 0).all()


def test_what_has_no_subspace_is_refused() -> None:
    with pytest.raises(NumericsError, match="every target gradient is zero"):
        fit_subspace(np.zeros((3, 3)), "auto")
    with pytest.raises(NumericsError, match="not finite"):
        fit_subspace(np.full((2, 2), np.nan), "auto")

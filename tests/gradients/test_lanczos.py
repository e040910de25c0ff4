"""Lanczos' method on plain symmetric matrices, against all their eigenpairs in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gradsift.errors import NumericsError
from gradsift.gradients import lanczos
from gradsift.gradients.lanczos import lanczos_bytes, largest_eigenpairs, most_eigenvectors

CPU = torch.device("cpu")
SIZE = 150
SIGNS = np.where(np.arange(SIZE) % 3, 1.0, -1.0)
RANDOM = np.random.default_rng(7)


def with_eigenvalues(values: np.ndarray) -> np.ndarray:
    axes = np.linalg.qr(np.random.default_rng(1).standard_normal((len(values), len(values))))[0]
    return (axes * values) @ axes.T


def products(matrix: np.ndarray, count: list[int] | None = None) -> Callable[[Tensor], Tensor]:
    """Return the product with a matrix in float32, counted in the first entry of `count`."""
    tensor = torch.from_numpy(matrix).float()

    def multiply(vector: Tensor) -> Tensor:
        assert vector.dtype == torch.float32
        if count is not None:
            count[0] += 1
        return tensor @ vector

    return multiply


def leading(matrix: np.ndarray) -> np.ndarray:
    values = np.linalg.eigvalsh(matrix)
    return values[np.argsort(-np.abs(values))]


def padded(*values: float) -> np.ndarray:
    return np.pad(values, (0, SIZE - len(values)))


@pytest.mark.parametrize(
    ("values", "count"),
    [
        pytest.param(SIGNS * np.arange(1, SIZE + 1) ** -0.5, 10, id="indefinite"),
        pytest.param(np.arange(1, SIZE + 1) ** -0.5, 1, id="one"),
        pytest.param(SIGNS * 0.9 ** np.arange(SIZE), 30, id="many"),
        pytest.param(
            np.r_[3 + np.linspace(0, 1e-3, 5), -2 - np.linspace(0, 1e-3, 5), np.full(140, 0.5)],
            10,
            id="clustered",
        ),
        pytest.param(np.repeat([5.0, 4.0, -3.0, 1.0, 0.0], 30), 10, id="repeated"),
        pytest.param(padded(3, -2, 1), 2, id="low rank"),
        pytest.param(padded(3, -2, 1), 10, id="fewer than asked for"),
        pytest.param(padded(), 10, id="zero"),
        pytest.param(np.ones(SIZE), 10, id="identity"),
        pytest.param(0.1 ** np.arange(10), 3, id="below rounding"),
        pytest.param(np.array([3.0, -2.9, 2, 1, 0.5, -0.1]), 5, id="all but one"),
        pytest.param(np.array([3.0, -2.9, 2, 1, 0.5, -0.1]), 6, id="all"),
        pytest.param(np.array([-2.0]), 1, id="a number"),
        pytest.param(1e-20 * SIGNS * np.arange(1, SIZE + 1) ** -0.5, 10, id="tiny"),
    ],
)
def test_eigenpairs_are_those_of_the_matrix(values: np.ndarray, count: int) -> None:
    matrix = with_eigenvalues(values)
    found, vectors = largest_eigenpairs(products(matrix), len(values), count, 0, CPU)
    exact, rows = leading(matrix)[:count], vectors.double().numpy()
    scale = abs(exact[0])
    np.testing.assert_allclose(np.abs(found), np.abs(exact), rtol=1e-3, atol=3.1e-5 * scale)
    assert (np.diff(np.abs(found)) <= 0).all()
    assert vectors.dtype == torch.float32
    np.testing.assert_allclose(rows @ rows.T, np.eye(count), atol=2e-6)
    residuals = np.linalg.norm(matrix @ rows.T - rows.T * found, axis=0)
    assert (residuals <= np.maximum(0.01 * np.abs(found), 3.1e-5 * scale)).all()


def test_no_more_products_than_arpack_takes() -> None:
    from scipy.sparse.linalg import LinearOperator, eigsh

    total = [0], [0]
    for seed in range(5):
        matrix = with_eigenvalues(np.random.default_rng(seed).standard_normal(300))
        largest_eigenpairs(products(matrix, total[0]), 300, 10, seed, CPU)
        multiply = products(matrix, total[1])
        operator = LinearOperator(
            matrix.shape,
            matvec=lambda v, by=multiply: by(torch.from_numpy(v).float()).double().numpy(),
            dtype=np.float64,
        )  # type: ignore[call-arg]
        start = np.random.default_rng(seed).standard_normal(300)
        eigsh(operator, k=10, v0=start, tol=0.01)  # type: ignore[arg-type]
    assert total[0][0] <= 1.2 * total[1][0]


def test_vectors_are_orthonormal_where_few_of_many_entries_are_large() -> None:
    size = 300_000
    diagonal = torch.arange(1, size + 1) ** -0.5
    values, vectors = largest_eigenpairs(lambda v: diagonal * v, size, 3, 0, CPU)
    np.testing.assert_allclose(values, [1, 2**-0.5, 3**-0.5], rtol=2e-6)
    rows = vectors.double().numpy()
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=2e-6)


def test_pieces_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_eigenvalues(SIGNS * np.arange(1, SIZE + 1) ** -0.5)
    whole = largest_eigenpairs(products(matrix), SIZE, 5, 0, CPU)
    again = largest_eigenpairs(products(matrix), SIZE, 5, 0, CPU)
    assert (whole[0] == again[0]).all()
    assert torch.equal(whole[1], again[1])
    monkeypatch.setattr(lanczos, "_PIECE", 17)
    cut = largest_eigenpairs(products(matrix), SIZE, 5, 0, CPU)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-5)
    torch.testing.assert_close(cut[1], whole[1], rtol=0, atol=1e-4)


def test_what_is_not_found_or_not_finite_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_eigenvalues(RANDOM.uniform(-1, 1, SIZE))
    broken = matrix.copy()
    broken[3, 4] = np.nan
    with pytest.raises(NumericsError, match="a product with the Hessian is not finite"):
        largest_eigenpairs(products(broken), SIZE, 2, 0, CPU)
    monkeypatch.setattr(lanczos, "_MOST_RESTARTS", 1)
    with pytest.raises(NumericsError, match=r"after 1 restarts .* of 10 eigenvectors .* fewer"):
        largest_eigenpairs(products(matrix), SIZE, 10, 0, CPU)


def test_memory_said_is_memory_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, empty = [], torch.empty

    def counted(*shape: int, **options: object) -> Tensor:
        found = empty(*shape, **options)  # type: ignore[call-overload]
        taken.append(found.numel() * found.element_size())
        return found

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(lanczos, "_PIECE", 40)
    matrix = with_eigenvalues(SIGNS * np.arange(1, SIZE + 1) ** -0.5)
    for count in (3, 12):
        taken.clear()
        largest_eigenpairs(products(matrix), SIZE, count, 0, CPU)
        assert sum(taken) == lanczos_bytes(count, SIZE) + 4 * SIZE * count  # and what it returns
    assert most_eigenvectors(4 * SIZE * 41, SIZE) == 19
    assert most_eigenvectors(4 * SIZE * 20, SIZE) == 0

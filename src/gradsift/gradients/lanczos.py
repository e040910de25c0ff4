"""Eigenpairs of largest magnitude of a symmetric matrix that is known by its products alone.

Thick-restart Lanczos (Wu and Simon, 2000, SIAM J. Matrix Anal. Appl. 22): a few orthonormal vectors
are kept, the matrix is projected onto them, and when they are as many as may be, those combinations
of them that come nearest to the eigenvectors wanted are kept, and the others made anew.

The vectors are float32 and lie on one device, cut into pieces of so many entries: work goes by the
piece, nothing larger than a few vectors is made beside them, and no index exceeds 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.determinism import one_thread
from gradsift.errors import NumericsError

Product = Callable[[Float[Tensor, " entry"]], Float[Tensor, " entry"]]
Pieces = list[Float[Tensor, "vector _"]]

_ACCURACY = 0.01  # of an eigenvalue: the length of H v - θ v, relative to θ
_ROUNDING = 256 * float(np.finfo(np.float32).eps)  # what a product may be wrong by, of ‖H‖
_PIECE = 2**18  # entries of each vector
_FEWEST_VECTORS = 20  # to work with, however few are asked for
_MOST_RESTARTS = 100  # ten eigenvectors of a real Hessian take two


def lanczos_bytes(count: int, size: int) -> int:
    """Return what the vectors take, of `size` entries, that find `count` eigenvectors."""
    return 4 * size * _num_vectors(count, size)


def most_eigenvectors(memory: int, size: int) -> int:
    """Return how many can be found with vectors of at most so many bytes; 0: not even one.

    >>> lanczos_bytes(30, 1000), most_eigenvectors(lanczos_bytes(30, 1000), 1000)
    (248000, 30)
    """
    fitting = memory // (4 * size)
    return fitting // 2 - 1 if fitting >= _num_vectors(1, size) else 0


def _num_vectors(count: int, size: int) -> int:
    """Return how many orthonormal vectors are worked with, and one more that is made next."""
    return min(max(2 * count + 1, _FEWEST_VECTORS), size) + 1


def largest_eigenpairs(
    multiply: Product, size: int, count: int, seed: int, device: torch.device
) -> tuple[Float[np.ndarray, " eigenvalue"], Float[Tensor, "eigenvalue entry"]]:
    """Return the `count` eigenvalues θ of largest magnitude, the largest first, and unit vectors.

    `multiply` returns H v for a v on `device`, where the vectors are kept; those returned lie on
    the CPU. For each, ‖H v - θ v‖ ≤ 1 % of |θ|, or 3e-5 of the largest |θ|: so much may float32
    products be wrong, and smaller eigenvalues cannot be told from one another or from zero. As with
    any method that stops there, of eigenvalues that are near each other some can be passed over for
    the next, even if that is much smaller. Of an eigenvalue that is repeated the further vectors
    are found where the Lanczos vectors span a space that H maps into itself (it is of low rank,
    say), else only as rounding brings them in.

    >>> matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
    >>> largest_eigenpairs(lambda v: matrix @ v, 3, 2, 0, matrix.device)[0].round(4).tolist()
    [-3.0, 2.0]

    Raises:
        NumericsError: If a product is not finite, or the bound on restarts is reached.
    """
    room, rng = _num_vectors(count, size) - 1, np.random.default_rng(seed)
    pieces = [
        torch.empty(room + 1, min(_PIECE, size - start), device=device)
        for start in range(0, size, _PIECE)
    ]
    _store(pieces, 0, _random(size, rng))
    _orthogonalise(pieces, 0)
    projected, kept = np.zeros((room, room)), 0
    earlier, good = np.zeros(count), np.zeros(count, bool)
    for _ in range(_MOST_RESTARTS):
        norm, closed = _fill(multiply, pieces, projected, kept, rng)
        values, turn = _by_magnitude(projected)
        magnitudes = np.abs(values[:count])
        tolerance = np.maximum(_ACCURACY * magnitudes, _ROUNDING * magnitudes[0])
        good = norm * np.abs(turn[-1, :count]) <= tolerance
        # a closed space hides what lies outside it: random vectors go in until nothing changes
        settled = not closed or room == size or (magnitudes - earlier <= tolerance).all()
        if good.all() and settled:
            return values[:count], _combine(pieces, turn[:, :count])
        kept, earlier = count + min(int(good.sum()), (room - count) // 2), magnitudes
        _restart(pieces, turn[:, :kept])
        projected = np.diag(np.pad(values[:kept], (0, room - kept)))
    raise NumericsError(
        f"after {_MOST_RESTARTS} restarts of Lanczos' method {int(good.sum())} of {count} "
        "eigenvectors of the Hessian are found; ask for fewer (--eigenvectors)"
    )


def _fill(
    multiply: Product, pieces: Pieces, projected: np.ndarray, first: int, rng: np.random.Generator
) -> tuple[float, bool]:
    """Make the vectors after `first`, and the rest of `projected`, which is V H Vᵀ.

    Returns the length of what H times the last one has outside of them all, and whether any were
    found that H maps among themselves: the next is then a random one.
    """
    room, size, norm, closed = len(projected), sum(p.shape[1] for p in pieces), 0.0, False
    for last in range(first, room):
        new = last + 1
        _store(pieces, new, multiply(torch.cat([piece[last] for piece in pieces])))
        along, norm = _orthogonalise(pieces, new)
        if not np.isfinite(norm):
            raise NumericsError(
                "a product with the Hessian is not finite: the loss of an example, or how it "
                "changes, is beyond float32 at this adapter; lower warmup.learning_rate"
            )
        projected[:new, last] = projected[last, :new] = along
        if norm <= _ROUNDING * np.abs(projected).max() or new == size:
            norm, closed = 0.0, True
            _store(pieces, new, _random(size, rng))
            _orthogonalise(pieces, new)
    return norm, closed


def _random(size: int, rng: np.random.Generator) -> Float[Tensor, " entry"]:
    return torch.from_numpy(rng.standard_normal(size, dtype=np.float32))


def _store(pieces: Pieces, row: int, vector: Float[Tensor, " entry"]) -> None:
    for piece, part in zip(pieces, vector.split(_PIECE), strict=True):
        piece[row].copy_(part)


def _orthogonalise(pieces: Pieces, row: int) -> tuple[Float[np.ndarray, " before"], float]:
    """Make a vector orthogonal to those before it, and of length one.

    By classical Gram-Schmidt, done twice: then what is left is orthogonal to rounding (Giraud et
    al., 2005). Returns its coordinates in those before, and the length of what was left.
    """
    zero = torch.zeros((), dtype=torch.float64, device=pieces[0].device)
    total = np.zeros(row)
    for _ in range(2):
        # in float64: a sum of millions in float32 loses what is small beside its largest entry
        along = sum((piece[:row].double() @ piece[row].double() for piece in pieces), zero)
        for piece in pieces:
            piece[row].sub_(along.float() @ piece[:row])
        total += along.cpu().numpy()
    norm = float(sum((piece[row].double().square().sum() for piece in pieces), zero).sqrt())
    if norm > 0:
        for piece in pieces:
            piece[row].div_(norm)
    return total, norm


def _by_magnitude(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a small matrix' eigenvalues, those of largest magnitude first, and eigenvectors."""
    with one_thread():
        values, vectors = np.linalg.eigh(matrix)
    order = np.argsort(-np.abs(values), kind="stable")
    return values[order], vectors[:, order]


def _restart(pieces: Pieces, turn: Float[np.ndarray, "used kept"]) -> None:
    """Put combinations of the vectors in place of them, and what follows all of them next."""
    room, kept = turn.shape
    for piece in pieces:
        piece[:kept] = _turned(piece, turn)
        piece[kept] = piece[room]


def _combine(pieces: Pieces, turn: Float[np.ndarray, "used kept"]) -> Float[Tensor, "kept entry"]:
    """Return combinations of the vectors, freeing these piece by piece."""
    found = torch.empty(turn.shape[1], sum(piece.shape[1] for piece in pieces))
    for into in found.split(_PIECE, dim=1):
        into.copy_(_turned(pieces.pop(0), turn))
    return found


def _turned(
    piece: Float[Tensor, "vector _"], turn: Float[np.ndarray, "used kept"]
) -> Float[Tensor, "kept _"]:
    return torch.from_numpy(turn.T.astype(np.float32)).to(piece.device) @ piece[: len(turn)]

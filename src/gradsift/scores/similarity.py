"""How alike pool examples are with target examples: by cosine of stored rows, or as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.determinism import one_thread

Rows = slice | Int[np.ndarray, " row"]


@runtime_checkable
class RowStore(Protocol):
    """An array, or what reads one from files, row by row."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Rows, /) -> np.ndarray: ...


@runtime_checkable
class Similarity(Protocol):
    """How alike each pool example is with each target example, and with groups of them."""

    @property
    def comparable(self) -> Bool[np.ndarray, " query"]:
        """Which target examples can be compared with at all."""
        ...

    @property
    def width(self) -> int:
        """How many entries of a pool example are in memory while it is compared."""
        ...

    def __len__(self) -> int: ...

    def with_examples(self, rows: Rows) -> Float[np.ndarray, "row query"]:
        """Return the similarity of some pool examples with each target example."""
        ...

    def with_means(
        self, rows: Rows, members: Bool[np.ndarray, "task query"]
    ) -> Float[np.ndarray, "row task"]:
        """Return the similarity with the mean of each group of target examples."""
        ...

    def projected_norms(self, rows: Rows) -> Float[np.ndarray, " row"] | None:
        """Return the norms inside the subspace, where there is one."""
        ...


@dataclass(frozen=True)
class View:
    """What pool and target examples are compared by, at one checkpoint.

    `weight` is the checkpoint's share in the score. `gradient_norms` are those of the pool
    examples where the rows are coordinates of gradients in a subspace, so that norms tell how much
    of a gradient lies there.
    """

    pool: RowStore
    target: Float[np.ndarray, "query feature"]
    weight: float = 1.0
    gradient_norms: RowStore | None = None

    def cosines(
        self, rows: Rows, references: Float[np.ndarray, "reference feature"], norm_power: float
    ) -> Float[np.ndarray, "row reference"]:
        """Return the weighted cosines of some pool examples, times (‖c‖/‖g‖)^p.

        An example without a gradient has cosine 0 with everything.
        """
        features = np.asarray(self.pool[rows], np.float32)
        with one_thread():
            cosines = _unit(features) @ _unit(references).T
        if norm_power:
            assert self.gradient_norms is not None
            norms = np.linalg.norm(features, axis=1)
            share = np.divide(norms, self.gradient_norms[rows], where=norms > 0, out=norms * 0)
            cosines *= (share**norm_power)[:, None]
        return cosines * np.float32(self.weight)


@dataclass(frozen=True)
class Cosines:
    """Similarity by the cosine of two rows, summed over the checkpoints.

    Target examples whose rows are zero have no direction and take no part.
    """

    views: Sequence[View]
    norm_power: float = 0.0

    def __len__(self) -> int:
        return len(self.views[0].pool)

    @property
    def width(self) -> int:
        """The number of features or of target examples, whichever is larger."""
        return max(max(view.target.shape) for view in self.views)

    @property
    def comparable(self) -> Bool[np.ndarray, " query"]:
        """Which target examples have a direction at some checkpoint."""
        return np.any([np.linalg.norm(view.target, axis=1) > 0 for view in self.views], axis=0)

    def with_examples(self, rows: Rows) -> Float[np.ndarray, "row query"]:
        """Return the cosines with each target example."""
        return _sum([view.cosines(rows, view.target, self.norm_power) for view in self.views])

    def with_means(
        self, rows: Rows, members: Bool[np.ndarray, "task query"]
    ) -> Float[np.ndarray, "row task"]:
        """Return the cosines with the mean row of each group."""
        return _sum(
            [
                view.cosines(rows, _means(view.target, members), self.norm_power)
                for view in self.views
            ]
        )

    def projected_norms(self, rows: Rows) -> Float[np.ndarray, " row"] | None:
        """Return the norms inside the subspace of the last checkpoint, where there is one."""
        view = self.views[-1]
        return None if view.gradient_norms is None else np.linalg.norm(view.pool[rows], axis=1)


@dataclass(frozen=True)
class PerNorm:
    """Rows over a norm: inner products with directions of length 1 become cosines.

    An example without a gradient has cosine 0 with everything.
    """

    rows: RowStore
    norms: RowStore

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Rows) -> np.ndarray:
        norms = self.norms[rows][:, None]
        return self.rows[rows] / np.where(norms > 0, norms, 1)


@dataclass(frozen=True)
class Table:
    """Similarity that is stored as such, a column per target example, in weighted parts."""

    parts: Sequence[tuple[RowStore, float]]

    def __len__(self) -> int:
        return len(self.parts[0][0])

    @property
    def width(self) -> int:
        """The number of target examples."""
        return self.with_examples(slice(0, 1)).shape[1]

    @property
    def comparable(self) -> Bool[np.ndarray, " query"]:
        """All target examples: whatever a column holds is an answer."""
        return np.ones(self.width, dtype=bool)

    def with_examples(self, rows: Rows) -> Float[np.ndarray, "row query"]:
        """Return the stored similarity."""
        return _sum([np.asarray(part[rows]) * np.float32(weight) for part, weight in self.parts])

    def with_means(self, rows: Rows, members: np.ndarray) -> Float[np.ndarray, "row task"]:
        """Return nothing useful: there are no rows of which a mean could be taken."""
        raise AssertionError("stored similarities have no mean row")

    def projected_norms(self, rows: Rows) -> None:
        """Return nothing: there is no subspace."""


@dataclass(frozen=True)
class Directions(Table):
    """Similarity that is linear in a direction of length 1 per target example.

    `grams`, one for each part: inner products of the directions at their own lengths, of which
    the means are taken. A direction of length 0 takes no part.
    """

    grams: Sequence[Float[np.ndarray, "query query"]]

    @property
    def comparable(self) -> Bool[np.ndarray, " query"]:
        """Which target examples have a direction at some checkpoint."""
        return np.any([np.diag(gram) > 0 for gram in self.grams], axis=0)

    def with_means(
        self, rows: Rows, members: Bool[np.ndarray, "task query"]
    ) -> Float[np.ndarray, "row task"]:
        """Return the similarity with the mean direction of each group, at length 1."""
        found = []
        for (part, weight), gram in zip(self.parts, self.grams, strict=True):
            squares = ((members @ gram) * members).sum(axis=1)
            shares = members * np.sqrt(np.clip(np.diag(gram), 0, None))
            shares *= (weight / np.sqrt(np.where(squares > 0, squares, np.inf)))[:, None]
            with one_thread():
                found.append(np.asarray(part[rows], np.float32) @ shares.T.astype(np.float32))
        return _sum(found)


def _sum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum(arrays, axis=0) if len(arrays) > 1 else arrays[0]


def _means(
    target: Float[np.ndarray, "query rank"], members: np.ndarray
) -> Float[np.ndarray, "task rank"]:
    return np.stack([target[own].mean(axis=0) for own in members]).astype(target.dtype)


def _unit(rows: Float[np.ndarray, "row rank"]) -> Float[np.ndarray, "row rank"]:
    """Return the rows at length 1, those of length 0 as they are."""
    norms = np.linalg.norm(rows, axis=1)
    return rows / np.where(norms > 0, norms, 1)[:, None]

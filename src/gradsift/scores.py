"""One score per pool example and target, and whose turn it is to pick; higher is better.

Methods that compare pool examples with target examples differ in how alike they find two of them
(`Cosines`, `Table`); `Alignment` does the rest. The others rank the pool as such (`Ranking`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.bits import one_thread
from gradsift.config import PolicyConfig
from gradsift.errors import ConfigError

_ENTRIES_AT_ONCE = 1 << 21  # float32 entries of one piece of the example × target matrix: 8 MB


Rows = slice | Int[np.ndarray, " row"]


@runtime_checkable
class RowStore(Protocol):
    """An array, or what reads one from files, row by row."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Rows, /) -> np.ndarray: ...


@runtime_checkable
class Scores(Protocol):
    """How the pool fares for one target."""

    def scores(
        self,
    ) -> tuple[Float[np.ndarray, " example"], Int[np.ndarray, " example"] | None]:
        """Return every pool example's score, and the target example that won it, if one did."""
        ...

    def turns(self, policy: PolicyConfig) -> Float[np.ndarray, "example turn"]:
        """Return the scores for each whose turn it can be to pick."""
        ...

    def winners(
        self, policy: PolicyConfig, rows: Int[np.ndarray, " row"], turns: Int[np.ndarray, " row"]
    ) -> Int[np.ndarray, " row"] | None:
        """Return the target example that each pick was made for, if any was."""
        ...

    def with_examples(self, rows: Rows) -> Float[np.ndarray, "row query"] | None:
        """Return how alike some pool examples are with each target example, if that counts."""
        ...

    def projected_norms(self, rows: Rows) -> Float[np.ndarray, " row"] | None:
        """Return ‖c‖, the norm of the gradients inside the subspace, where there is one."""
        ...


class Ranking:
    """Scores of a method that does not look at the target examples."""

    def __init__(self, values: Float[np.ndarray, " example"]) -> None:
        self._values = values

    def scores(self) -> tuple[Float[np.ndarray, " example"], None]:
        """Return the scores; no target example wins any."""
        return self._values, None

    def turns(self, policy: PolicyConfig) -> Float[np.ndarray, "example turn"]:
        """Return the scores as the only column.

        Raises:
            ConfigError: If target examples were to take turns.
        """
        if policy.strategy != "top":
            raise ConfigError(
                "policy.strategy=round-robin needs a method that compares with target examples; "
                "perplexity, length and random do not: use policy.strategy=top"
            )
        return self._values[:, None]

    def winners(self, policy: PolicyConfig, rows: np.ndarray, turns: np.ndarray) -> None:
        """Return nothing: no pick was made for a target example."""

    def with_examples(self, rows: Rows) -> None:
        """Return nothing: target examples do not count."""

    def projected_norms(self, rows: Rows) -> None:
        """Return nothing: there is no subspace."""


@runtime_checkable
class Similarity(Protocol):
    """How alike each pool example is with each target example, and with groups of them."""

    @property
    def alive(self) -> Bool[np.ndarray, " query"]:
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
        """As many as it has features, or the target examples."""
        return max(max(view.target.shape) for view in self.views)

    @property
    def alive(self) -> Bool[np.ndarray, " query"]:
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
class Table:
    """Similarity that is stored as such, a column per target example, in weighted parts."""

    parts: Sequence[tuple[RowStore, float]]

    def __len__(self) -> int:
        return len(self.parts[0][0])

    @property
    def width(self) -> int:
        """The target examples."""
        return self.with_examples(slice(0, 1)).shape[1]

    @property
    def alive(self) -> Bool[np.ndarray, " query"]:
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


class Alignment:
    """Scores by similarity with one target's examples and tasks.

    `aggregation`, over the examples of a task: `max`: the best of them; `mean-cosine`: their mean;
    `task-mean`: the similarity with their mean (Xia et al., 2024, arXiv 2402.04333). Then the best
    task counts.
    """

    def __init__(
        self,
        similarity: Similarity,
        tasks: Sequence[str],
        aggregation: str,
        among: Bool[np.ndarray, " query"] | None = None,
    ) -> None:
        """Compare with all target examples, or with those `among` which it is asked for."""
        self._similarity, self._aggregation, self._tasks = similarity, aggregation, tasks
        self._alive = similarity.alive if among is None else similarity.alive & among
        names = sorted({task for task, alive in zip(tasks, self._alive, strict=True) if alive})
        members = np.array(tasks)[None, :] == np.array(names)[:, None]
        self._members = members & self._alive  # task × target example

    def among(self, chosen: Bool[np.ndarray, " query"]) -> Alignment:
        """Return the scores by some of the target examples alone."""
        return Alignment(self._similarity, self._tasks, self._aggregation, chosen & self._alive)

    @property
    def alive(self) -> Bool[np.ndarray, " query"]:
        """Which target examples take part."""
        return self._alive

    def with_examples(self, rows: Rows) -> Float[np.ndarray, "row query"]:
        """Return the alignment with each target example; −∞ for those that take no part."""
        found = self._similarity.with_examples(rows)
        return np.where(self._alive, found, np.float32(-np.inf))

    def with_tasks(
        self, rows: Rows, by_example: Float[np.ndarray, "row query"]
    ) -> Float[np.ndarray, "row task"]:
        """Return the alignment with each task, as the aggregation says."""
        if self._aggregation == "task-mean":
            return self._similarity.with_means(rows, self._members)
        aggregate = np.max if self._aggregation == "max" else np.mean
        return np.stack([aggregate(by_example[:, own], axis=1) for own in self._members], axis=1)

    def projected_norms(self, rows: Rows) -> Float[np.ndarray, " row"] | None:
        """Return ‖c‖ of some pool examples, where the similarity knows a subspace."""
        if not isinstance(rows, slice) or rows != slice(None):
            return self._similarity.projected_norms(rows)
        found = [self._similarity.projected_norms(piece) for piece in self._pieces()]
        parts = [part for part in found if part is not None]
        return np.concatenate(parts) if parts else None

    def best(
        self, rows: Rows, tasks: Int[np.ndarray, " row"] | None = None
    ) -> tuple[Float[np.ndarray, " row"], Int[np.ndarray, " row"]]:
        """Return the score of some rows and the target example that won.

        The score is that with the best task, or with the task given for each row; the winner is the
        best example of that task.
        """
        by_example = self.with_examples(rows)
        by_task = self.with_tasks(rows, by_example)
        winner = by_task.argmax(axis=1) if tasks is None else tasks
        score = by_task[np.arange(len(winner)), winner]
        return score, np.where(self._members[winner], by_example, -np.inf).argmax(axis=1)

    def scores(self) -> tuple[Float[np.ndarray, " example"], Int[np.ndarray, " example"]]:
        """Return every pool example's final score and the target example that won."""
        parts = [self.best(rows) for rows in self._pieces()]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def turns(self, policy: PolicyConfig) -> Float[np.ndarray, "example turn"]:
        """Return the alignment with each whose turn it can be: the whole target, or one each."""
        if policy.strategy == "top":
            return self.scores()[0][:, None]
        parts = [self.with_examples(rows) for rows in self._pieces()]
        if policy.per == "task":
            pieces = zip(self._pieces(), parts, strict=True)
            parts = [self.with_tasks(rows, part) for rows, part in pieces]
        return np.concatenate(parts)

    def winners(
        self, policy: PolicyConfig, rows: Int[np.ndarray, " row"], turns: Int[np.ndarray, " row"]
    ) -> Int[np.ndarray, " row"]:
        """Return the target example that each pick was made for."""
        if policy.strategy == "top":
            return self.best(rows)[1]
        return turns if policy.per == "example" else self.best(rows, turns)[1]

    def _pieces(self) -> Iterator[slice]:
        """Yield ranges of the pool whose cosines fit into memory at once."""
        num_examples = len(self._similarity)
        step = max(1, _ENTRIES_AT_ONCE // self._similarity.width)
        for start in range(0, num_examples, step):
            yield slice(start, min(start + step, num_examples))


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

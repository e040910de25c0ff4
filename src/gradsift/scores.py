"""From coordinates to one score per pool example: cosines with the target, aggregated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.config import GistConfig, PolicyConfig

_ENTRIES_AT_ONCE = 1 << 25  # float32 entries of one piece of the example × target matrix: 128 MB


Rows = slice | Int[np.ndarray, " row"]


@dataclass(frozen=True)
class View:
    """Pool and target coordinates of one target at one checkpoint.

    `weight` is the checkpoint's share in the score, `gradient_norms` those of the pool examples.
    """

    pool: Float[np.ndarray, "example rank"]
    gradient_norms: Float[np.ndarray, " example"]
    target: Float[np.ndarray, "query rank"]
    weight: float = 1.0

    def projected_share(self, rows: Rows) -> Float[np.ndarray, " row"]:
        """Return ‖c‖/‖g‖: how much of some examples' gradients lies in the subspace."""
        norms = np.linalg.norm(self.pool[rows], axis=1)
        return np.divide(norms, self.gradient_norms[rows], where=norms > 0, out=norms * 0)

    def cosines(
        self, rows: Rows, references: Float[np.ndarray, "reference rank"], norm_power: float
    ) -> Float[np.ndarray, "row reference"]:
        """Return the weighted cosines of some pool examples, times (‖c‖/‖g‖)^p.

        An example without a gradient has cosine 0 with everything.
        """
        cosines = _unit(self.pool[rows]) @ _unit(references).T
        if norm_power:
            cosines *= (self.projected_share(rows) ** norm_power)[:, None]
        return cosines * np.float32(self.weight)


class Alignment:
    """How pool examples align with one target's examples and tasks, over all checkpoints.

    Target examples without a gradient have no direction and take no part.
    """

    def __init__(self, views: Sequence[View], tasks: Sequence[str], config: GistConfig) -> None:
        self.views = views
        self._config = config
        self._alive = np.any([np.linalg.norm(v.target, axis=1) > 0 for v in views], axis=0)
        names = sorted({task for task, alive in zip(tasks, self._alive, strict=True) if alive})
        members = np.array(tasks)[None, :] == np.array(names)[:, None]
        self._members = members & self._alive  # task × target example

    def with_examples(self, rows: Rows) -> Float[np.ndarray, "row query"]:
        """Return the alignment with each target example; −∞ for those without a gradient."""
        power = self._config.norm_power
        total = _sum([view.cosines(rows, view.target, power) for view in self.views])
        return np.where(self._alive, total, np.float32(-np.inf))

    def with_tasks(
        self, rows: Rows, by_example: Float[np.ndarray, "row query"]
    ) -> Float[np.ndarray, "row task"]:
        """Return the alignment with each task, as the aggregation says.

        `max`: the best of its examples; `mean-cosine`: their mean; `task-mean`: the cosine with
        the mean of their coordinates (Xia et al., 2024, arXiv 2402.04333).
        """
        if self._config.aggregation == "task-mean":
            power = self._config.norm_power
            return _sum(
                [
                    view.cosines(rows, _means(view.target, self._members), power)
                    for view in self.views
                ]
            )
        aggregate = np.max if self._config.aggregation == "max" else np.mean
        return np.stack([aggregate(by_example[:, own], axis=1) for own in self._members], axis=1)

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
        num_examples, step = len(self.views[0].pool), max(1, _ENTRIES_AT_ONCE // len(self._alive))
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

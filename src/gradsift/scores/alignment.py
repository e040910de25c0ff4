"""Scores by similarity with a target's examples and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.config import PolicyConfig
from gradsift.scores.similarity import Rows, Similarity

_ENTRIES_AT_ONCE = 1 << 21  # float32 entries of one piece of the example × target matrix: 8 MB


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
        self._comparable = similarity.comparable if among is None else similarity.comparable & among
        names = sorted(
            {task for task, comparable in zip(tasks, self._comparable, strict=True) if comparable}
        )
        members = np.array(tasks)[None, :] == np.array(names)[:, None]
        self._members = members & self._comparable  # task × target example

    def among(self, chosen: Bool[np.ndarray, " query"]) -> Alignment:
        """Return the scores by some of the target examples alone."""
        return Alignment(
            self._similarity, self._tasks, self._aggregation, chosen & self._comparable
        )

    @property
    def comparable(self) -> Bool[np.ndarray, " query"]:
        """Which target examples take part."""
        return self._comparable

    def with_examples(self, rows: Rows) -> Float[np.ndarray, "row query"]:
        """Return the alignment with each target example; −∞ for those that take no part."""
        found = self._similarity.with_examples(rows)
        return np.where(self._comparable, found, np.float32(-np.inf))

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

    def rankings(self, policy: PolicyConfig) -> Float[np.ndarray, "example ranking"]:
        """Return a column for each ranking: of the whole target, or one per example or task."""
        if policy.strategy == "top":
            return self.scores()[0][:, None]
        width = len(self._members) if policy.per == "task" else len(self._tasks)
        # column by column in memory: a policy goes through one at a time
        found = np.empty((len(self._similarity), width), np.float32, order="F")
        for rows in self._pieces():
            part = self.with_examples(rows)
            found[rows] = self.with_tasks(rows, part) if policy.per == "task" else part
        return found

    def winners(
        self, policy: PolicyConfig, rows: Int[np.ndarray, " row"], rankings: Int[np.ndarray, " row"]
    ) -> Int[np.ndarray, " row"]:
        """Return the target example that each pick was made for."""
        if policy.strategy == "top":
            return self.best(rows)[1]
        return rankings if policy.per == "example" else self.best(rows, rankings)[1]

    def _pieces(self) -> Iterator[slice]:
        """Yield ranges of the pool whose cosines fit into memory at once."""
        num_examples = len(self._similarity)
        step = max(1, _ENTRIES_AT_ONCE // self._similarity.width)
        for start in range(0, num_examples, step):
            yield slice(start, min(start + step, num_examples))

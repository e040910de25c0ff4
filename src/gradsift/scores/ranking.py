"""What every method gives: scores of the pool for a target; and the plain ranking."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from gradsift.config import PolicyConfig
from gradsift.errors import ConfigError
from gradsift.scores.similarity import Rows


@runtime_checkable
class Scores(Protocol):
    """Scores of the whole pool for one target."""

    def scores(
        self,
    ) -> tuple[Float[np.ndarray, " example"], Int[np.ndarray, " example"] | None]:
        """Return every pool example's score, and the target example that won it, if one did."""
        ...

    def rankings(self, policy: PolicyConfig) -> Float[np.ndarray, "example ranking"]:
        """Return a column for each ranking that the policy picks from."""
        ...

    def winners(
        self, policy: PolicyConfig, rows: Int[np.ndarray, " row"], rankings: Int[np.ndarray, " row"]
    ) -> Int[np.ndarray, " row"] | None:
        """Return the target example that each pick was made for, if any was."""
        ...

    def with_examples(self, rows: Rows) -> Float[np.ndarray, "row query"] | None:
        """Return how alike some pool examples are with each target example, if that counts."""
        ...

    def projected_norms(self, rows: Rows) -> Float[np.ndarray, " row"] | None:
        """Return ‖c‖, the norm of the gradients inside the subspace, where there is one."""
        ...


def refuse_turns(policy: PolicyConfig) -> None:
    """Find out whether a method that looks at no target example can serve a policy.

    Raises:
        ConfigError: If the policy picks for single target examples or tasks.
    """
    if policy.strategy != "top":
        raise ConfigError(
            f"policy.strategy={policy.strategy} needs a method that compares with target "
            "examples, and this one does not: use policy.strategy=top or another --method"
        )


class Ranking:
    """Scores of a method that does not look at the target examples."""

    def __init__(self, values: Float[np.ndarray, " example"]) -> None:
        self._values = values

    def scores(self) -> tuple[Float[np.ndarray, " example"], None]:
        """Return the scores; no target example wins any."""
        return self._values, None

    def rankings(self, policy: PolicyConfig) -> Float[np.ndarray, "example ranking"]:
        """Return the scores as the only column.

        Raises:
            ConfigError: If the policy picks for single target examples or tasks.
        """
        refuse_turns(policy)
        return self._values[:, None]

    def winners(self, policy: PolicyConfig, rows: np.ndarray, rankings: np.ndarray) -> None:
        """Return nothing: no pick was made for a target example."""

    def with_examples(self, rows: Rows) -> None:
        """Return nothing: target examples do not count."""

    def projected_norms(self, rows: Rows) -> None:
        """Return nothing: there is no subspace."""

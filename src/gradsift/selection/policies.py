"""From scores to picks: from which ranking, what is refused and why, until the budget is spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from gradsift.config import PolicyConfig
from gradsift.data.duplicates import DedupColumns, DuplicateFinder, Refusal
from gradsift.errors import ConfigError
from gradsift.sections import parse_share
from gradsift.selection.turns import Ranked, serve_the_least, take_turns
from gradsift.types import Budget


@dataclass(frozen=True)
class Candidates:
    """The pool as a policy sees it."""

    texts: DedupColumns
    sources: pa.Array
    num_tokens: Int[np.ndarray, " example"]


@dataclass(frozen=True)
class Picks:
    """The rows picked, best first; `rankings` says from which column each was picked."""

    rows: list[int]
    rankings: list[int]
    refused: list[Refusal]
    shortfall: str | None


def describe_policy(policy: PolicyConfig) -> dict[str, str]:
    """Return what a policy asks for in plain words, by setting.

    >>> describe_policy(PolicyConfig())["decontaminate"]
    'examples near those of the target are refused (Jaccard similarity of 0.8 or more)'
    """
    near = f"(Jaccard similarity of {policy.similarity:g} or more)"
    cap = policy.source_cap
    strategy = "the top of the ranking"
    if policy.strategy == "round-robin":
        strategy = f"round-robin: each target {policy.per} picks in turn"
    elif policy.strategy == "balanced":
        strategy = f"balanced: the target {policy.per} that is served least picks next"
    caps = cap.items() if isinstance(cap, dict) else [("any one source", cap)] if cap else []
    return {
        "budget": Budget.parse(policy.budget).in_words,
        "strategy": strategy,
        "source_cap": "; ".join(f"at most {share} from {source}" for source, share in caps)
        or "no cap on sources",
        "duplicates": {
            "keep": "repeated picks are kept",
            "exact": "repeated picks are refused",
            "near": f"picks near an earlier one are refused {near}",
        }[policy.duplicates],
        "decontaminate": {
            "none": "repeats of target examples are kept",
            "exact": "repeats of target examples are refused",
            "near": f"examples near those of the target are refused {near}",
        }[policy.decontaminate],
        **_describe_weights(policy),
    }


def _describe_weights(policy: PolicyConfig) -> dict[str, str]:
    words = {
        "none": "",
        "rank": "weights falling by rank",
        "softmax": f"weights by softmax of the scores (temperature {policy.temperature:g})",
    }[policy.weights]
    return {"weights": words} if words else {}


def shorten_policy(policy: PolicyConfig) -> str:
    """Return the budget of a policy and what else is not as by default, as settings.

    >>> shorten_policy(PolicyConfig(budget="2%", source_cap="20%"))
    '2%, source_cap=20%'
    """
    usual, found = PolicyConfig(), [policy.budget]
    for key, value in policy:
        if key not in ("name", "budget") and value != getattr(usual, key):
            found.append(f"{key}={value}")
    return ", ".join(found)


def pick(
    rankings: Float[np.ndarray, "example ranking"],
    pool: Candidates,
    target: DedupColumns,
    policy: PolicyConfig,
) -> Picks:
    """Return the best examples within the budget, one at a time from a column of `rankings`.

    From the columns in turn or, under `balanced`, from the one that is served least; of it the best
    example that is neither picked nor refused yet; ties go to the one that comes first in the pool.
    With a single column that is the plain top of the ranking. Values are finite or −∞.

    Raises:
        ConfigError: If the budget is more than the pool, or too small for a single example.
    """
    limits = _Limits.of(policy, pool.sources, pool.num_tokens)
    share = _share_of_each(limits, rankings.shape[1])
    ranked = [Ranked(column, share) for column in rankings.T]

    def upcoming() -> list[int]:
        share = _share_of_each(limits, len(ranked))
        return np.unique(np.concatenate([own.upcoming(share) for own in ranked])).tolist()

    repeats = DuplicateFinder(pool.texts, target, policy, upcoming)
    gone = np.zeros(len(rankings), dtype=bool)
    picked: dict[int, int] = {}
    refused: dict[int, Refusal] = {}

    def pick_from(ranking: int) -> int | None:
        while (row := ranked[ranking].best_left(gone)) is not None:
            refusal = limits.refuses(row) or repeats.refuses(row)
            if refusal is None and not limits.fits(row):
                return None
            gone[row] = True
            if refusal is None:
                picked[row] = ranking
                limits.spend(row)
                repeats.remember(row)
                return row
            refused[row] = refusal
        return None

    if policy.strategy == "balanced":
        serve_the_least(rankings, pick_from)
    else:
        take_turns(len(ranked), pick_from)
    shortfall = limits.shortfall(Counter(r.reason for r in refused.values()))
    if not picked:
        raise ConfigError(f"nothing can be picked within a budget of {policy.budget}: {shortfall}")
    return Picks([*picked], [*picked.values()], [*refused.values()], shortfall)


def _share_of_each(limits: _Limits, num_rankings: int) -> int:
    """Return how many rows of each column are likely to come up, with some that are refused."""
    return (1024 + int(1.1 * limits.examples_left)) // num_rankings + 1


def check_policy(
    policy: PolicyConfig, sources: pa.Array, num_tokens: Int[np.ndarray, " example"]
) -> None:
    """Find out before the work whether a policy fits the pool.

    Raises:
        ConfigError: If the budget is more than the pool, a capped source is not in it, or a cap
            does not leave room for one example.
    """
    limits = _Limits.of(policy, sources, num_tokens)
    for source, cap in limits.caps.items():
        if cap < 1:
            raise ConfigError(
                f"policy.source_cap leaves {source!r} nothing of a budget of {policy.budget}; "
                "raise the cap or the budget"
            )


@dataclass
class _Limits:
    """The budget and the caps on sources, in examples or tokens, as they are spent."""

    policy: PolicyConfig
    sources: pa.Array
    num_tokens: Int[np.ndarray, " example"]
    limit: int
    in_tokens: bool
    spent: int = 0
    spent_by_source: Counter[str] = field(default_factory=Counter)
    closed: bool = False

    @classmethod
    def of(
        cls, policy: PolicyConfig, sources: pa.Array, num_tokens: Int[np.ndarray, " example"]
    ) -> _Limits:
        budget = Budget.parse(policy.budget)
        size, unit = len(num_tokens), "examples"
        if budget.unit == "tok":
            size, unit = int(num_tokens.sum()), "tokens"
        limit = int(budget.amount)
        if budget.unit == "%":
            limit = max(1, int(budget.amount * size / 100))
        if limit > size:
            raise ConfigError(
                f"a budget of {limit} {unit}, but the pool holds {size}; ask for less"
            )
        return cls(policy, sources, num_tokens, limit, budget.unit == "tok")

    @property
    def examples_left(self) -> int:
        left = self.limit - self.spent
        return left if not self.in_tokens else int(left / max(self.num_tokens.mean(), 1))

    @cached_property
    def caps(self) -> Mapping[str, int]:
        cap = self.policy.source_cap
        sources = set(self.sources.unique().to_pylist())
        if isinstance(cap, str):
            cap = dict.fromkeys(sources, cap)
        unknown = sorted(set(cap or ()) - sources)
        if unknown:
            raise ConfigError(
                f"policy.source_cap names the source {unknown[0]!r}, which the pool does not have "
                f"({', '.join(sorted(sources))})"
            )
        return {name: int(parse_share(s) * Decimal(self.limit)) for name, s in (cap or {}).items()}

    def cost(self, row: int) -> int:
        return int(self.num_tokens[row]) if self.in_tokens else 1

    def refuses(self, row: int) -> Refusal | None:
        if self.cost(row) > self.limit:
            return Refusal(row, "longer than the whole budget")
        if self.caps:
            source = self.sources[row].as_py()
            cap = self.caps.get(source)
            if cap is not None and self.spent_by_source[source] + self.cost(row) > cap:
                return Refusal(row, "source cap")
        return None

    def fits(self, row: int) -> bool:
        """Whether the example fits into what is left; the first that does not ends the picks."""
        self.closed = self.closed or self.spent + self.cost(row) > self.limit
        return not self.closed

    def spend(self, row: int) -> None:
        self.spent += self.cost(row)
        if self.caps:
            self.spent_by_source[self.sources[row].as_py()] += self.cost(row)

    def shortfall(self, refusals: Counter[str]) -> str | None:
        """Return what kept the picks from filling the budget, where no example was left."""
        if self.closed or self.spent == self.limit:
            return None
        unit = "tokens" if self.in_tokens else "examples"
        reasons = ", ".join(f"{count} for {reason}" for reason, count in refusals.most_common())
        return f"{self.spent} of {self.limit} {unit} picked, the rest was refused ({reasons})"

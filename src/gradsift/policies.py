"""From scores to picks: whose turn it is, what is refused and why, until the budget is spent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property

import numpy as np
from datasketch import MinHash, MinHashLSH
from jaxtyping import Float, Int

from gradsift.config import PolicyConfig, parse_share
from gradsift.data import Message
from gradsift.data.encoded import normalise
from gradsift.errors import ConfigError
from gradsift.types import Budget

_PERMUTATIONS = 128
_WORDS = 3  # words of one shingle
# in scripts that put no spaces between words (Thai, Chinese, Japanese), each character is one
_WORD = re.compile(
    "[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\\s\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+"
)


@dataclass(frozen=True)
class Texts:
    """What is compared to find repeated examples, row by row.

    Hashes are those of the encoded set; `conversations` fetches some rows' texts, in bulk.
    """

    ids: Sequence[str]
    text_hashes: Sequence[bytes]
    prompt_hashes: Sequence[bytes | None]
    conversations: Callable[[Sequence[int]], list[list[Message]]]


@dataclass(frozen=True)
class Candidates:
    """The pool as a policy sees it."""

    texts: Texts
    sources: Sequence[str]
    num_tokens: Int[np.ndarray, " example"]


@dataclass(frozen=True)
class Refusal:
    """An example that was passed over; `like` is the id of the one it repeats."""

    row: int
    reason: str
    like: str | None = None


@dataclass(frozen=True)
class Picks:
    """The rows picked, best first; `turns` says which column of the alignment each was for."""

    rows: list[int]
    turns: list[int]
    refused: list[Refusal]
    shortfall: str | None


def pick(
    alignment: Float[np.ndarray, "example turn"],
    pool: Candidates,
    target: Texts,
    policy: PolicyConfig,
) -> Picks:
    """Return the best examples within the budget, the columns of `alignment` taking turns.

    Each column picks its best example that nobody has taken or refused; ties go to the one that
    comes first in the pool. With a single column that is the plain top of the ranking.

    Raises:
        ConfigError: If the budget is more than the pool, or too small for a single example.
    """
    purse = _Purse.of(policy, pool.sources, pool.num_tokens)
    orders = [np.argsort(-column, kind="stable") for column in alignment.T]
    orders = [order[np.isfinite(alignment[order, j])] for j, order in enumerate(orders)]
    positions = [0] * len(orders)

    def upcoming() -> list[int]:
        share = max(1024, 2 * purse.examples_left) // len(orders) + 1
        return sorted(
            {int(r) for o, p in zip(orders, positions, strict=True) for r in o[p : p + share]}
        )

    repeats = _Repeats(pool.texts, target, policy, upcoming)
    picked: dict[int, int] = {}
    refused: dict[int, Refusal] = {}

    def take_turn(turn: int) -> bool:
        for row in map(int, orders[turn][positions[turn] :]):
            if row not in picked and row not in refused:
                refusal = purse.refuses(row) or repeats.refuses(row)
                if refusal is None and not purse.can_pay(row):
                    return False
                if refusal is None:
                    picked[row] = turn
                    purse.pay(row)
                    repeats.remember(row)
                    return True
                refused[row] = refusal
            positions[turn] += 1
        return False

    while sum(map(take_turn, range(len(orders)))):
        pass
    shortfall = purse.shortfall(Counter(r.reason for r in refused.values()))
    if not picked:
        raise ConfigError(f"nothing can be picked within {policy.budget}: {shortfall}")
    return Picks([*picked], [*picked.values()], [*refused.values()], shortfall)


def check_policy(
    policy: PolicyConfig, sources: Sequence[str], num_tokens: Int[np.ndarray, " example"]
) -> None:
    """Find out before the work whether a policy fits the pool.

    Raises:
        ConfigError: If the budget is more than the pool, a capped source is not in it, or a cap
            does not leave room for one example.
    """
    purse = _Purse.of(policy, sources, num_tokens)
    for source, cap in purse.caps.items():
        if cap < 1:
            raise ConfigError(
                f"policy.source_cap leaves {source!r} nothing of a budget of {policy.budget}; "
                "raise the cap or the budget"
            )


@dataclass
class _Purse:
    """The budget and the caps on sources, in examples or tokens, as they are spent."""

    policy: PolicyConfig
    sources: Sequence[str]
    num_tokens: Int[np.ndarray, " example"]
    limit: int
    in_tokens: bool
    spent: int = 0
    spent_by_source: Counter[str] = field(default_factory=Counter)
    closed: bool = False

    @classmethod
    def of(
        cls, policy: PolicyConfig, sources: Sequence[str], num_tokens: Int[np.ndarray, " example"]
    ) -> _Purse:
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
        sources = set(self.sources)
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
        source = self.sources[row]
        cap = self.caps.get(source)
        if cap is not None and self.spent_by_source[source] + self.cost(row) > cap:
            return Refusal(row, "source cap")
        return None

    def can_pay(self, row: int) -> bool:
        """Whether the example fits into what is left; the first that does not ends the picks."""
        self.closed = self.closed or self.spent + self.cost(row) > self.limit
        return not self.closed

    def pay(self, row: int) -> None:
        self.spent += self.cost(row)
        self.spent_by_source[self.sources[row]] += self.cost(row)

    def shortfall(self, refusals: Counter[str]) -> str | None:
        """Return what kept the picks from filling the budget, where no example was left."""
        if self.closed or self.spent == self.limit:
            return None
        unit = "tokens" if self.in_tokens else "examples"
        told = ", ".join(f"{count} for {reason}" for reason, count in refusals.most_common())
        return f"{self.spent} of {self.limit} {unit} picked, all others were refused ({told})"


class _Repeats:
    """Which examples repeat a target example or an earlier pick, exactly or nearly.

    Near means a Jaccard similarity of three-word shingles, found by MinHash and then computed
    exactly (Broder, 1997). Texts are fetched for those examples alone that come into question.
    """

    def __init__(
        self,
        pool: Texts,
        target: Texts,
        policy: PolicyConfig,
        upcoming: Callable[[], list[int]],
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._upcoming = upcoming
        self._shingles: dict[int, frozenset[str]] = {}
        self._target: dict[bytes, str] = {}
        self._picked: dict[bytes, str] = {}
        self._near_target = _NearIndex(policy.similarity)
        self._near_picked = _NearIndex(policy.similarity)
        if policy.decontaminate != "none":
            for hashes in (target.prompt_hashes, target.text_hashes):
                found = zip(hashes, target.ids, strict=True)
                self._target |= {key: name for key, name in found if key is not None}
        if policy.decontaminate == "near":
            conversations = target.conversations(range(len(target.ids)))
            for name, messages in zip(target.ids, conversations, strict=True):
                self._near_target.add(name, shingles(messages))

    def refuses(self, row: int) -> Refusal | None:
        text, prompt = self._pool.text_hashes[row], self._pool.prompt_hashes[row]
        like = self._target.get(text)
        if like is None and prompt is not None:
            like = self._target.get(prompt)
        if like is None and self._policy.decontaminate == "near":
            like = self._near_target.find(self._shingles_of(row))
        if like is not None:
            return Refusal(row, "repeats the target", like)
        like = self._picked.get(text)
        if like is None and self._policy.duplicates == "near":
            like = self._near_picked.find(self._shingles_of(row))
        return None if like is None else Refusal(row, "repeats a pick", like)

    def remember(self, row: int) -> None:
        if self._policy.duplicates == "keep":
            return
        self._picked[self._pool.text_hashes[row]] = self._pool.ids[row]
        if self._policy.duplicates == "near":
            self._near_picked.add(self._pool.ids[row], self._shingles_of(row))

    def _shingles_of(self, row: int) -> frozenset[str]:
        if row not in self._shingles:
            rows = self._upcoming()
            conversations = self._pool.conversations(rows)
            self._shingles = {
                r: shingles(messages) for r, messages in zip(rows, conversations, strict=True)
            }
        return self._shingles[row]


class _NearIndex:
    """Sets of shingles, and the question whether another is near one of them."""

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        # far more weight on not missing a pair: what is found is checked exactly
        self._index = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        self._members: list[tuple[str, frozenset[str]]] = []

    def add(self, name: str, members: frozenset[str]) -> None:
        self._index.insert(len(self._members), _minhash(members))
        self._members.append((name, members))

    def find(self, members: frozenset[str]) -> str | None:
        """Return the name of the first of the most similar, None where none is near."""
        if not self._members:
            return None
        found = sorted(int(i) for i in self._index.query(_minhash(members)))  # type: ignore[arg-type]
        likeness = [_jaccard(members, self._members[i][1]) for i in found]
        if not found or max(likeness) < self._similarity:
            return None
        return self._members[found[likeness.index(max(likeness))]][0]


def shingles(messages: Sequence[Message]) -> frozenset[str]:
    """Return the runs of three words of a conversation, blind to case and white space.

    >>> sorted(shingles([{"role": "user", "content": "Add one and Two"}]))
    ['add one and', 'one and two']
    """
    words = _WORD.findall(normalise(" ".join(m["content"] for m in messages)))
    starts = range(max(1, len(words) - _WORDS + 1))
    return frozenset(" ".join(words[i : i + _WORDS]) for i in starts)


def _minhash(members: frozenset[str]) -> MinHash:
    result = MinHash(num_perm=_PERMUTATIONS, seed=1)
    result.update_batch([member.encode() for member in members])
    return result


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)

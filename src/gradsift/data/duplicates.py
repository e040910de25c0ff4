"""Examples that repeat another, exactly or nearly: what decontamination and deduplication look for.

Near means a Jaccard similarity of three-word shingles. With the target's examples it is computed
for all that share a shingle; among the picks, which are many, near ones are found by MinHash first
(Broder, 1997).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from datasketch import MinHash, MinHashLSH

from gradsift.config import PolicyConfig
from gradsift.data.conversations import Message, text_of
from gradsift.data.encoded import EncodedSet
from gradsift.data.groups import normalise

_PERMUTATIONS = 128
_TEXTS_AT_ONCE = 8192
_WORDS = 3  # words of one shingle


# in scripts that put no spaces between words (Thai, Chinese, Japanese), each character is one
_WORD = re.compile(
    "[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\\s\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+"
)


@dataclass(frozen=True)
class DedupColumns:
    """What is compared to find repeated examples, as columns with an entry per row.

    Hashes are those of the encoded set; `conversations` fetches some rows' texts, in bulk.
    """

    ids: pa.Array
    text_hashes: pa.Array
    prompt_hashes: pa.Array
    conversations: Callable[[Sequence[int]], list[list[Message]]]


@dataclass(frozen=True)
class Refusal:
    """An example that was passed over; `like` is the id of the one it repeats."""

    row: int
    reason: str
    like: str | None = None


class DuplicateFinder:
    """Finds pool examples that repeat a target example or an earlier pick.

    Texts are fetched of those rows alone that are ranked next: `upcoming` returns them.
    """

    def __init__(
        self,
        pool: DedupColumns,
        target: DedupColumns,
        policy: PolicyConfig,
        upcoming: Callable[[], list[int]],
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._upcoming = upcoming
        self._target_matches: dict[int, str | None] = {}
        self._shingles: dict[int, frozenset[str]] = {}
        self._target: dict[bytes, str] = {}
        self._picked: dict[bytes, str] = {}
        self._near_target: _SharedShingles | None = None
        self._near_picked = _NearIndex(policy.similarity)
        names = target.ids.to_pylist()
        if policy.decontaminate != "none":
            for hashes in (target.prompt_hashes, target.text_hashes):
                found = zip(hashes.to_pylist(), names, strict=True)
                self._target |= {key: name for key, name in found if key is not None}
        if policy.decontaminate == "near":
            conversations = target.conversations(range(len(names)))
            known = dict(enumerate(map(shingles, conversations)))
            self._near_target = _SharedShingles(names, known, policy.similarity)

    def refuses(self, row: int) -> Refusal | None:
        """Return why the example is not to be picked, None where it repeats nothing."""
        text, prompt = (
            hashes[row].as_py() for hashes in (self._pool.text_hashes, self._pool.prompt_hashes)
        )
        like = self._target.get(text)
        if like is None and prompt is not None:
            like = self._target.get(prompt)
        if like is None and self._near_target is not None:
            self._load_texts_for(row)
            like = self._target_matches[row]
        if like is not None:
            return Refusal(row, "repeats the target", like)
        like = self._picked.get(text)
        if like is None and self._policy.duplicates == "near":
            self._load_texts_for(row)
            like = self._near_picked.find(self._shingles[row])
        return None if like is None else Refusal(row, "repeats a pick", like)

    def remember(self, row: int) -> None:
        """Refuse from now on what repeats this pick."""
        if self._policy.duplicates == "keep":
            return
        name = self._pool.ids[row].as_py()
        self._picked[self._pool.text_hashes[row].as_py()] = name
        if self._policy.duplicates == "near":
            self._load_texts_for(row)
            self._near_picked.add(name, self._shingles[row])

    def _load_texts_for(self, row: int) -> None:
        """Read the texts of all rows that come up, and keep what is needed of them."""
        if row in self._target_matches:
            return
        rows = self._upcoming()
        self._target_matches, self._shingles = {}, {}
        for start in range(0, len(rows), _TEXTS_AT_ONCE):
            some = rows[start : start + _TEXTS_AT_ONCE]
            for own, messages in zip(some, self._pool.conversations(some), strict=True):
                found = shingles(messages)
                self._target_matches[own] = self._near_target and self._near_target.find(found)
                if self._policy.duplicates == "near":
                    self._shingles[own] = found


class _SharedShingles:
    """The target's shingles, and who has them: a few sets, of which all near ones are found."""

    def __init__(
        self, names: Sequence[str], known: Mapping[int, frozenset[str]], similarity: float
    ) -> None:
        self._names, self._known, self._similarity = names, known, similarity
        self._owners: dict[str, list[int]] = {}
        for number, members in known.items():
            for member in members:
                self._owners.setdefault(member, []).append(number)

    def find(self, members: frozenset[str]) -> str | None:
        """Return the name of the first of the most similar, None where none is near."""
        shared = Counter(n for m in members if m in self._owners for n in self._owners[m])
        similarities = {
            number: count / (len(members) + len(self._known[number]) - count)
            for number, count in shared.items()
        }
        best = max(similarities.values(), default=0.0)
        if not similarities or best < self._similarity:
            return None
        return self._names[min(number for number, value in similarities.items() if value == best)]


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
        similarities = [_jaccard(members, self._members[i][1]) for i in found]
        if not found or max(similarities) < self._similarity:
            return None
        return self._members[found[similarities.index(max(similarities))]][0]


def shingles(messages: Sequence[Message]) -> frozenset[str]:
    """Return the runs of three words of a conversation, blind to case and white space.

    >>> sorted(shingles([{"role": "user", "content": "Add one and Two"}]))
    ['add one and', 'one and two']
    """
    words = _WORD.findall(normalise(" ".join(map(text_of, messages))))
    starts = range(max(1, len(words) - _WORDS + 1))
    return frozenset(" ".join(words[i : i + _WORDS]) for i in starts)


def _minhash(members: frozenset[str]) -> MinHash:
    result = MinHash(num_perm=_PERMUTATIONS, seed=1)
    result.update_batch([member.encode() for member in members])
    return result


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def dedup_columns(encoded: EncodedSet, columns: Mapping[str, str]) -> DedupColumns:
    """Return the columns of a set by which repeats are found."""
    return DedupColumns(
        *(encoded.column(name) for name in ("id", "text_hash", "prompt_hash")),
        conversations=lambda rows: encoded.conversations(rows, columns),
    )

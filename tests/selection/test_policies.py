from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.config import PolicyConfig
from gradsift.data.conversations import Message
from gradsift.data.duplicates import DedupColumns, shingles
from gradsift.errors import ConfigError
from gradsift.selection.policies import Candidates, Picks, check_policy, pick


def texts(contents: Sequence[str], prefix: str = "p") -> DedupColumns:
    def conversations(rows: Sequence[int]) -> list[list[Message]]:
        return [[{"role": "user", "content": contents[row]}] for row in rows]

    names = [f"{prefix}{i}" for i in range(len(contents))]
    hashes = [content.lower().encode() for content in contents]
    columns = (names, hashes, [b"q" + h for h in hashes])
    types = (pa.string(), pa.binary(), pa.binary())
    return DedupColumns(*map(pa.array, columns, types), conversations=conversations)


def run(
    scores: Any,
    contents: Sequence[str] | None = None,
    target: Sequence[str] = (),
    sources: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    **policy: Any,
) -> Picks:
    scores = np.asarray(scores, dtype=np.float32)
    scores = scores[:, None] if scores.ndim == 1 else scores
    count = len(scores)
    pool = Candidates(
        texts(contents or [f"text number {i} of {count}" for i in range(count)]),
        pa.array(sources or ["s"] * count),
        np.asarray(tokens or [10] * count),
    )
    return pick(scores, pool, texts(target, "t"), PolicyConfig(**policy))


def test_the_top_with_ties_broken_by_pool_order() -> None:
    assert run([0.5, 0.9, 0.5, 0.1, 0.9], budget="3").rows == [1, 4, 0]


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=4, max_size=30), st.data())
def test_a_smaller_budget_is_a_prefix_of_a_larger(scores: list[float], data: Any) -> None:
    large = data.draw(st.integers(2, len(scores)))
    small = data.draw(st.integers(1, large))
    picked = run(scores, budget=str(large), decontaminate="none").rows
    assert run(scores, budget=str(small), decontaminate="none").rows == picked[:small]


@pytest.mark.parametrize(
    ("budget", "count"), [("10%", 3), ("1%", 1), ("5", 5), ("55tok", 5), ("100%", 30)]
)
def test_budgets(budget: str, count: int) -> None:
    assert len(run(np.linspace(0, 1, 30), budget=budget).rows) == count


def test_a_token_budget_ends_at_the_first_that_does_not_fit() -> None:
    picks = run([4, 3, 2, 1], tokens=[5, 5, 9, 1], budget="12tok")
    assert (picks.rows, picks.refused, picks.shortfall) == ([0, 1], [], None)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("31", "a budget of 31 examples, but the pool holds 30"),
        ("301tok", "a budget of 301 tokens, but the pool holds 300"),
        (
            "9tok",
            "within a budget of 9tok: .*30 for longer than the whole budget",
        ),
    ],
)
def test_impossible_budgets(budget: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(np.linspace(0, 1, 30), budget=budget)


def test_what_is_too_long_or_refused_does_not_end_the_picks() -> None:
    assert run([4, 3, 2, 1], tokens=[1500, 10, 10, 10], budget="25tok").rows == [1, 2]
    picks = run([3, 2, 1], tokens=[9, 9, 9], sources=["a", "a", "b"], budget="27tok",
                source_cap={"a": "40%"})  # fmt: skip
    assert (picks.rows, [r.row for r in picks.refused]) == ([0, 2], [1])
    assert picks.shortfall == ("18 of 27 tokens picked, the rest was refused (1 for source cap)")


def test_a_cap_without_room_for_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leaves 's' nothing of a budget of 2; raise the cap"):
        check_policy(
            PolicyConfig(budget="2", source_cap="20%"), pa.array(["s"] * 9), np.full(9, 10)
        )


def test_scripts_without_spaces_have_words_too() -> None:
    text = "机器学习是人工智能的一个分支它研究如何让计算机从数据中学习规律"
    near = text.replace("规律", "规则")
    assert run([2, 1], [near, "完全不同的内容"], [text], budget="1").rows == [1]


def test_examples_take_turns() -> None:
    alignment = [[9, 1], [8, 2], [7, 9], [1, 8]]
    picks = run(alignment, budget="4", strategy="round-robin")
    assert (picks.rows, picks.rankings) == ([0, 2, 1, 3], [0, 1, 0, 1])


def test_a_refused_example_does_not_cost_the_turn() -> None:
    alignment = [[9, 1], [8, 2], [7, 9], [1, 8]]
    picks = run(
        alignment, ["same words here", "Same words here", "c d e", "f g h"], budget="3",
        strategy="round-robin",
    )  # fmt: skip
    assert (picks.rows, picks.rankings) == ([0, 2, 3], [0, 1, 0])
    assert [(r.row, r.reason, r.like) for r in picks.refused] == [(1, "repeats a pick", "p0")]


def test_a_target_example_without_direction_has_no_turn() -> None:
    picks = run([[1, -np.inf], [2, -np.inf]], budget="2", strategy="round-robin")
    assert (picks.rows, picks.rankings) == ([1, 0], [0, 0])


def test_source_caps() -> None:
    sources = ["a", "a", "a", "b", "b"]
    picks = run([5, 4, 3, 2, 1], sources=sources, budget="4", source_cap="50%")
    assert picks.rows == [0, 1, 3, 4]
    assert picks.refused[0].reason == "source cap"
    picks = run([5, 4, 3, 2, 1], sources=sources, budget="4", source_cap={"a": "25%"})
    assert picks.rows == [0, 3, 4]
    assert picks.shortfall == "3 of 4 examples picked, the rest was refused (2 for source cap)"
    with pytest.raises(ConfigError, match="names the source 'c', which the pool does not have"):
        run([1, 2], sources=["a", "b"], source_cap={"c": "5%"})


WORDS = "the quick brown fox jumps over the lazy dog and runs away from it all today"


def test_duplicates() -> None:
    contents = [WORDS, WORDS.upper(), WORDS + " again", "something else entirely here"]
    kept = {p: run([4, 3, 2, 1], contents, budget="2", duplicates=p).rows
            for p in ("keep", "exact", "near")}  # fmt: skip
    assert kept == {"keep": [0, 1], "exact": [0, 2], "near": [0, 3]}


def test_decontamination() -> None:
    contents = [WORDS + " again", WORDS.upper(), "something else entirely here"]
    picks = run([3, 2, 1], contents, [WORDS], budget="1")
    assert picks.rows == [2]
    assert [(r.row, r.reason, r.like) for r in picks.refused] == [
        (0, "repeats the target", "t0"), (1, "repeats the target", "t0"),
    ]  # fmt: skip
    assert run([3, 2, 1], contents, [WORDS], budget="1", decontaminate="exact").rows == [0]
    assert run([2, 3, 1], contents, [WORDS], budget="1", decontaminate="none").rows == [1]


def test_similarity_decides_what_is_near() -> None:
    one, other = (shingles([{"role": "user", "content": c}]) for c in (WORDS, WORDS + " again"))
    jaccard = len(one & other) / len(one | other)
    for similarity, rows in ((jaccard + 0.01, [0, 1]), (jaccard - 0.01, [0])):
        policy = {"duplicates": "near", "similarity": similarity}
        assert run([2, 1], [WORDS, WORDS + " again"], budget="2", **policy).rows == rows

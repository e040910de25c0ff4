"""Columns that are sorted as far as picks reach, and who picks next, against the plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_policies import run

import reference
from gradsift.config import PolicyConfig
from gradsift.errors import ConfigError
from gradsift.selection.policies import Picks, describe_policy, shorten_policy
from gradsift.selection.turns import Ranked

VALUES = st.sampled_from([-np.inf, -1.0, 0.0, 0.25, 0.5, 1.0, 2.0])
quick = settings(deadline=None, max_examples=40)
TIED = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0])


def pairs(picks: Picks) -> list[tuple[int, int]]:
    return [*zip(picks.rows, picks.rankings, strict=True)]


@quick
@given(
    arrays.arrays(np.float32, st.integers(1, 60), elements=VALUES.map(float)),
    st.integers(1, 20),
    st.lists(st.integers(1, 9), max_size=8),
)
def test_a_column_is_ranked_as_a_full_stable_sort_would(
    values: np.ndarray, expected: int, taken: list[int]
) -> None:
    order = [int(row) for row in np.argsort(-values, kind="stable") if np.isfinite(values[row])]
    ranked, gone = Ranked(values, expected), np.zeros(len(values), dtype=bool)
    for count in [*taken, 60]:
        assert ranked.best_left(gone) == (order[0] if order else None)
        assert ranked.upcoming(count).tolist() == order[:count]
        gone[order[:count]] = True
        order = order[count:]
    assert ranked.best_left(gone) is None


def test_no_more_of_a_column_is_sorted_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def best(values: np.ndarray, count: int) -> np.ndarray:
        asked.append(count)
        return np.argsort(-values, kind="stable")[:count]

    monkeypatch.setattr("gradsift.selection.turns._best", best)
    ranked, gone = Ranked(np.arange(1000, dtype=np.float32), 100), np.zeros(1000, dtype=bool)
    assert ranked.best_left(gone) == 999
    gone[930:] = True
    assert ranked.best_left(gone) == 929
    assert asked == [100, 800]
    gone[1:] = True
    assert ranked.best_left(gone) == 0
    assert asked == [100, 800, 1000]


@quick
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(2, 40), st.integers(1, 5)), elements=TIED),
    st.data(),
)
def test_turns_are_those_of_the_plain_loop(rankings: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(rankings)))
    if data.draw(st.booleans()):
        rankings[:, data.draw(st.integers(0, rankings.shape[1] - 1))] = -np.inf
    if np.isinf(rankings).all():
        return
    picks = run(rankings, budget=str(count), strategy="round-robin", decontaminate="none")
    assert pairs(picks) == reference.picks_in_turn(rankings, count)


@quick
@given(st.integers(0, 2**20), st.integers(2, 40), st.integers(1, 6), st.data())
def test_balanced_picks_are_those_of_the_plain_loop(
    seed: int, num_rows: int, num_columns: int, data: st.DataObject
) -> None:
    """Columns of very different scale, one of them constant, another of −∞."""
    rng = np.random.default_rng(seed)
    rankings = rng.normal(size=(num_rows, num_columns)) * 10.0 ** rng.integers(-3, 4, num_columns)
    rankings = np.concatenate(
        [np.full((num_rows, 1), -np.inf), rankings, np.ones((num_rows, 1))], axis=1
    ).astype(np.float32)
    count = data.draw(st.integers(1, num_rows))
    picks = run(rankings, budget=str(count), strategy="balanced", decontaminate="none")
    assert pairs(picks) == reference.balanced_picks(rankings, count)


def test_ties_of_balanced_go_to_the_first_column_and_row() -> None:
    rankings = [[1, 0], [1, 0], [0, 1], [0, 1]]
    picks = run(rankings, budget="4", strategy="balanced")
    assert pairs(picks) == [(0, 0), (2, 1), (1, 0), (3, 1)]


def test_the_scale_of_a_column_changes_no_balanced_pick() -> None:
    rankings = np.random.default_rng(0).normal(size=(50, 4))
    scaled = rankings * [1, 1000, 0.01, 3] + [0, 5, -7, 100]
    picks, of_scaled = (run(r, budget="20", strategy="balanced") for r in (rankings, scaled))
    assert pairs(picks) == pairs(of_scaled)


def test_balanced_serves_all_where_the_top_serves_one() -> None:
    rng = np.random.default_rng(0)
    rankings = rng.normal(size=(400, 3)) * [10, 1, 1]
    best_of_all = rankings.max(1)
    normalised = (rankings - rankings.mean(0)) / rankings.std(0)
    rows = run(rankings, budget="30", strategy="balanced").rows
    top = run(best_of_all, budget="30").rows
    assert normalised[rows].mean(0).min() > 2 * normalised[top].mean(0).min()


def test_what_balanced_refuses_costs_no_turn_and_serves_nobody() -> None:
    rankings = [[9, 1], [8, 2], [7, 9], [1, 8]]
    contents = ["same words here", "Same words here", "c d e", "f g h"]
    picks = run(rankings, contents, budget="3", strategy="balanced")
    assert picks.rows == [0, 2, 3]
    assert [(r.row, r.reason, r.like) for r in picks.refused] == [(1, "repeats a pick", "p0")]
    sources = ["a", "a", "b", "b"]
    picks = run(rankings, sources=sources, budget="3", strategy="balanced", source_cap={"a": "34%"})
    assert (picks.rows, [r.reason for r in picks.refused]) == ([0, 2, 3], ["source cap"])
    picks = run(rankings, tokens=[5, 5, 5, 5], budget="12tok", strategy="balanced")
    assert (picks.rows, picks.shortfall) == ([0, 2], None)


def test_balanced_says_what_kept_it_from_the_budget() -> None:
    picks = run([[1, 2], [2, 1]], ["a b c", "a b c"], budget="2", strategy="balanced")
    assert picks.shortfall == "1 of 2 examples picked, the rest was refused (1 for repeats a pick)"


def test_balanced_needs_similarities_that_differ() -> None:
    with pytest.raises(ConfigError, match=r"found the same for all of them; use .*strategy=top"):
        run(np.ones((4, 2)), budget="2", strategy="balanced")


def test_balanced_in_words() -> None:
    policy = PolicyConfig(strategy="balanced", per="task")
    said = "balanced: the target task that is served least picks next"
    assert describe_policy(policy)["strategy"] == said
    assert shorten_policy(policy) == "5%, strategy=balanced, per=task"

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from gradsift.config import PolicyConfig
from gradsift.errors import ConfigError
from gradsift.method_config import GistConfig
from gradsift.scores.alignment import Alignment
from gradsift.scores.ranking import Ranking
from gradsift.scores.similarity import Cosines, Table, View

RNG = np.random.default_rng(0)
POOL = RNG.normal(size=(30, 5)).astype(np.float32)
TARGET = RNG.normal(size=(7, 5)).astype(np.float32)
NORMS = (np.linalg.norm(POOL, axis=1) * 2).astype(np.float32)
TASKS = ["a", "a", "b", "b", "b", "b", "c"]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def align(
    target: np.ndarray = TARGET, tasks: list[str] = TASKS, pool: np.ndarray = POOL, **config: object
) -> Alignment:
    norms = NORMS if len(pool) == len(NORMS) else np.ones(len(pool), np.float32)
    gist = GistConfig(**config)  # type: ignore[arg-type]
    view = View(pool, target, gradient_norms=norms)
    return Alignment(Cosines([view], gist.norm_power), tasks, gist.aggregation)


COSINES = unit(POOL) @ unit(TARGET).T
MEANS = np.stack([TARGET[[t == name for t in TASKS]].mean(0) for name in "abc"])
EXPECTED = {
    "max": COSINES.max(1),
    "task-mean": (unit(POOL) @ unit(MEANS).T).max(1),
    "mean-cosine": np.stack(
        [COSINES[:, [t == name for t in TASKS]].mean(1) for name in "abc"], 1
    ).max(1),
}


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_aggregations_over_unequal_tasks(aggregation: str) -> None:
    score, best = align(aggregation=aggregation).scores()
    np.testing.assert_allclose(score, EXPECTED[aggregation], rtol=1e-5)
    if aggregation == "max":
        np.testing.assert_array_equal(best, COSINES.argmax(1))


def test_norm_power_multiplies_by_the_share_in_the_subspace() -> None:
    np.testing.assert_allclose(align(norm_power=1).scores()[0], EXPECTED["max"] / 2, rtol=1e-5)
    np.testing.assert_allclose(align(norm_power=2).scores()[0], EXPECTED["max"] / 4, rtol=1e-5)


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_scale_of_any_gradient_changes_nothing_but_the_task_mean(aggregation: str) -> None:
    scale = RNG.uniform(0.1, 9, size=(30, 1)).astype(np.float32)
    scaled = align(pool=POOL * scale, aggregation=aggregation).scores()[0]
    np.testing.assert_allclose(scaled, EXPECTED[aggregation], rtol=1e-4)


@pytest.mark.parametrize("aggregation", EXPECTED)
def test_a_target_example_without_gradient_takes_no_part(aggregation: str) -> None:
    target = np.concatenate([TARGET, np.zeros((1, 5), np.float32)])
    for task in ("b", "alone"):
        score, best = align(target, [*TASKS, task], aggregation=aggregation).scores()
        expected, winners = align(aggregation=aggregation).scores()
        np.testing.assert_array_equal(best, winners)
        np.testing.assert_allclose(score, expected, rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["max", "task-mean", "mean-cosine"])
def test_duplicate_target_rows_change_no_score(aggregation: str) -> None:
    twice = np.concatenate([TARGET, TARGET])
    score, best = align(twice, TASKS * 2, aggregation=aggregation).scores()
    expected, winners = align(aggregation=aggregation).scores()
    np.testing.assert_allclose(score, expected, rtol=1e-5)
    np.testing.assert_array_equal(best % 7, winners)


def test_a_pool_example_without_gradient_scores_zero() -> None:
    pool = np.concatenate([POOL, np.zeros((1, 5), np.float32)])
    assert align(pool=pool).scores()[0][-1] == 0


def test_checkpoints_are_weighted_before_the_best_is_taken() -> None:
    other = RNG.normal(size=(30, 3)).astype(np.float32)
    other_target = RNG.normal(size=(7, 3)).astype(np.float32)
    views = [View(POOL, TARGET, 0.75), View(other, other_target, 0.25)]
    score, _ = Alignment(Cosines(views), TASKS, "max").scores()
    expected = 0.75 * COSINES + 0.25 * unit(other) @ unit(other_target).T
    np.testing.assert_allclose(score, expected.max(1), rtol=1e-5)


def test_turns_and_winners() -> None:
    alignment = align()
    rows = np.array([4, 9])
    top, example = PolicyConfig(), PolicyConfig(strategy="round-robin")
    task = PolicyConfig(strategy="round-robin", per="task")
    assert alignment.rankings(top).shape == (30, 1)
    assert alignment.rankings(example).shape == (30, 7)
    assert alignment.rankings(task).shape == (30, 3)
    for column in range(7):  # as a policy goes through them
        assert alignment.rankings(example)[:, column].flags.contiguous
    np.testing.assert_allclose(alignment.rankings(example), COSINES, rtol=1e-5)
    balanced = PolicyConfig(strategy="balanced")
    np.testing.assert_array_equal(alignment.rankings(balanced), alignment.rankings(example))
    turns = np.array([2, 1])
    np.testing.assert_array_equal(alignment.winners(balanced, rows, turns), turns)
    np.testing.assert_array_equal(alignment.winners(top, rows, turns * 0), COSINES[rows].argmax(1))
    np.testing.assert_array_equal(alignment.winners(example, rows, turns), turns)
    winners = alignment.winners(task, rows, turns)
    assert [TASKS[w] for w in winners] == ["c", "b"]


def test_stored_similarities_are_weighted_and_aggregated_alike() -> None:
    other = RNG.normal(size=COSINES.shape).astype(np.float32)
    table = Table([(COSINES, 0.75), (other, 0.25)])
    found, best = Alignment(table, TASKS, "max").scores()
    expected = 0.75 * COSINES + 0.25 * other
    np.testing.assert_allclose(found, expected.max(1), rtol=1e-5)
    np.testing.assert_array_equal(best, expected.argmax(1))
    assert Alignment(table, TASKS, "max").projected_norms(slice(None)) is None


def test_a_ranking_knows_no_target_examples() -> None:
    ranking = Ranking(NORMS)
    assert ranking.scores()[1] is None
    assert ranking.rankings(PolicyConfig())[:, 0].tolist() == NORMS.tolist()
    assert ranking.winners(PolicyConfig(), np.array([1]), np.array([0])) is None
    with pytest.raises(ConfigError, match=r"balanced needs a method that compares .*=top"):
        ranking.rankings(PolicyConfig(strategy="balanced"))


def test_the_number_of_threads_changes_no_bit() -> None:
    script = """
import hashlib
import numpy as np
from gradsift.gradients.subspace import fit_subspace
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
rng = np.random.default_rng(0)
pool, target = (rng.normal(size=(count, 54)).astype(np.float32) for count in (600, 64))
rows = rng.normal(size=(500, 600))
found = fit_subspace(np.einsum("ij,kj->ik", rows, rows), "95%").combination
scores = Alignment(Cosines([View(pool, target)]), ["t"] * 64, "max").scores()[0]
print(hashlib.sha256(scores.tobytes() + found.tobytes()).hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": count, "OMP_NUM_THREADS": count},
        ).stdout
        for count in "12"
    }  # fmt: skip
    assert len(found) == 1

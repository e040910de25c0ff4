"""What a pass over the pool left, read back as rows are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradsift.pool.shards import Shard, StoredTensor, find_damage, plan_shards, save_shard

VALUES = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    planned = plan_shards(23, 10, tmp_path, key="one run")
    for shard in planned:
        own = VALUES[shard.start : shard.stop]
        save_shard(shard, {"x": own, "norm": own[:, 0]})
    return planned


@pytest.mark.parametrize(
    "rows",
    [
        slice(None), slice(0, 10), slice(10, 23), slice(7, 21), slice(9, 11), slice(20, 99),
        slice(0, 0), slice(10, 10), slice(22, 23),
        np.array([22, 0, 10, 9, 0]), np.array([3]), np.array([], np.int64),
    ],
    ids=str,
)  # fmt: skip
def test_rows_are_those_asked_for_in_their_order(
    shards: list[Shard], rows: slice | np.ndarray
) -> None:
    for name, expected in (("x", VALUES[rows]), ("norm", VALUES[rows, 0])):
        stored = StoredTensor(shards, name, set())
        assert len(stored) == 23
        np.testing.assert_array_equal(stored[rows], expected)


def test_only_the_shards_of_the_rows_are_read(shards: list[Shard]) -> None:
    stored = StoredTensor(shards, "x", set())
    shards[1].path.unlink()
    np.testing.assert_array_equal(stored[np.array([21, 2])], VALUES[[21, 2]])
    np.testing.assert_array_equal(stored[2:9], VALUES[2:9])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_shard_is_noticed(shards: list[Shard], number: int) -> None:
    shards[number].path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[number].path} is gone"):
        StoredTensor(shards, "x", set())


def test_a_shard_of_other_rows_or_of_another_run_is_not_taken(
    shards: list[Shard], tmp_path: Path
) -> None:
    assert [find_damage(shard) for shard in shards] == [None] * 3
    others = plan_shards(23, 10, tmp_path, key="another run")
    assert all(str(find_damage(other)).startswith("it is not what was written") for other in others)
    shards[0].path.write_bytes(shards[1].path.read_bytes())  # of as many rows
    assert find_damage(shards[0]) == "it is not what was written for these rows of this run"
    with pytest.raises(FileNotFoundError, match=r"0000000000\.safetensors is damaged: it is not"):
        StoredTensor(shards, "x", set())


def test_a_shard_is_looked_at_once(shards: list[Shard]) -> None:
    intact: set[Path] = set()
    StoredTensor(shards, "x", intact)
    assert intact == {shard.path for shard in shards}
    shards[2].path.write_bytes(b"")
    StoredTensor(shards, "x", intact)

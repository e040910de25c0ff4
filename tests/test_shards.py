"""What a pass over the pool left, read back as rows are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradsift.shards import Stored, plan_shards, save_shard

VALUES = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for shard in plan_shards(23, 10, tmp_path):
        own = VALUES[shard.start : shard.stop]
        save_shard(shard, {"x": own, "norm": own[:, 0]})
    return tmp_path


@pytest.mark.parametrize(
    "rows",
    [
        slice(None), slice(0, 10), slice(10, 23), slice(7, 21), slice(9, 11), slice(20, 99),
        slice(0, 0), slice(10, 10), slice(22, 23),
        np.array([22, 0, 10, 9, 0]), np.array([3]), np.array([], np.int64),
    ],
    ids=str,
)  # fmt: skip
def test_rows_are_those_asked_for_in_their_order(directory: Path, rows: slice | np.ndarray) -> None:
    for name, expected in (("x", VALUES[rows]), ("norm", VALUES[rows, 0])):
        stored = Stored(directory, name, 23)
        assert len(stored) == 23
        np.testing.assert_array_equal(stored[rows], expected)


def test_only_the_shards_of_the_rows_are_read(directory: Path) -> None:
    stored = Stored(directory, "x", 23)
    (directory / "0000000010.safetensors").unlink()
    np.testing.assert_array_equal(stored[np.array([21, 2])], VALUES[[21, 2]])
    np.testing.assert_array_equal(stored[2:9], VALUES[2:9])


@pytest.mark.parametrize("number", [0, 10, 20])
def test_a_missing_shard_is_noticed(directory: Path, number: int) -> None:
    (directory / f"{number:010d}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=str(directory)):
        Stored(directory, "x", 23)
    with pytest.raises(FileNotFoundError):
        Stored(directory / "nowhere", "x", 23)

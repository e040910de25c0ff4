"""Tokens per batch and windows of a pass over the pool: found once, stored, taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.executors.local import Local
from gradsift.models.batches import MAX_EXAMPLES, lengths_of, plan_batches
from gradsift.pool.pool_pass import PoolPass
from gradsift.pool.shards import BATCH_TOKENS, WINDOW, read_facts, shard_size, window_size
from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.runs.stage import Stage

pytestmark = pytest.mark.usefixtures("_no_cache")
COUNT = 5000
STAGE = Stage("passed", {}, ("passed",), keeps_parts=True)


@pytest.fixture
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what Python collects alone, which takes long."""
    monkeypatch.setattr("gradsift.models.batch_size.clear_device_cache", lambda **_: None)


class Pool(EncodedSet):
    """Examples of 60 tokens, in memory."""

    def __init__(self) -> None: ...

    def __len__(self) -> int:
        return COUNT

    def column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([np.full(COUNT, 60)])

    def examples(self, rows: Sequence[int] | np.ndarray) -> list[Encoded]:
        return [Encoded(np.full(60, row, np.int32), np.arange(60) == 59) for row in rows]


class Device:
    """A GPU that is not there, of a made-up capacity in tokens; or a CPU."""

    def __init__(self, capacity: int, kind: str = "cuda") -> None:
        self.capacity, self.kind = capacity, kind
        self.windows: list[int] = []
        self.tried: list[int] = []

    def measure(self, examples: Sequence[Encoded], max_tokens: int) -> dict[str, torch.Tensor]:
        self.tried.append(max_tokens)
        lengths = lengths_of(examples)
        groups = plan_batches(lengths, max_tokens, MAX_EXAMPLES)
        if max(int(lengths[group].sum()) for group in groups) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if examples[0].input_ids.any() or examples[1].input_ids.any():  # no worst batch
            self.windows.append(len(examples))
        rows = torch.tensor([float(example.input_ids[0]) for example in examples])
        mates = torch.zeros(len(examples))  # what an example shares its batch with
        for group in groups:
            mates[group] = rows[group].sum()
        return {"row": rows, "mates": mates}

    def factory(self) -> tuple[object, torch.device]:
        return self.measure, torch.device(self.kind)


def passed(path: Path, devices: Mapping[str, Device], **engine: object) -> PoolPass:
    """Return a pass at a checkpoint for each device, done."""
    path.mkdir(exist_ok=True)
    (path / layout.OWNER).touch()
    settings = EngineConfig(**{"shard_size": 2048} | engine)  # type: ignore[arg-type]
    done = PoolPass("passed", Pool(), Run(path), Local(), settings)
    done.run(STAGE, {label: lambda own=own: own.factory for label, own in devices.items()})  # type: ignore[misc]
    for label in devices:
        np.testing.assert_array_equal(done.read("row", label)[:], np.arange(COUNT))
    return done


def facts(done: PoolPass, label: str) -> list[tuple[int, int]]:
    found = [read_facts(shard) for shard in done.shards(label)]
    return [(each[BATCH_TOKENS], each[WINDOW]) for each in found]


def test_windows_grow_with_the_tokens_that_a_gpu_holds(tmp_path: Path) -> None:
    small, large = Device(10**9), Device(3000)
    assert facts(passed(tmp_path / "a", {"": small}), "") == [(32_768, 2048)] * 3
    assert small.windows == [2048, 2048, 904]
    [(tokens, window), *_] = facts(passed(tmp_path / "b", {"": large}), "")
    assert 2500 < tokens <= 3000
    assert window == 1024
    assert large.windows == [1024] * 4 + [904]


def test_on_a_cpu_no_size_of_shards_changes_a_batch(tmp_path: Path) -> None:
    found = []
    for size in ("auto", 1024, 2048, 4096):
        cpu = Device(10**9, "cpu")
        done = passed(tmp_path / str(size), {"": cpu}, shard_size=size, batch_tokens=16_384)
        assert {window for _, window in facts(done, "")} == {1024}
        assert cpu.windows == [1024] * 4 + [904]
        found.append(done.read("mates", "")[:])
    assert all(np.array_equal(found[0], other) for other in found)


def test_a_run_that_goes_on_takes_tokens_and_windows_from_what_is_stored(tmp_path: Path) -> None:
    done = passed(tmp_path, {"": Device(10**9)})
    done.shards()[1].path.unlink()
    other = Device(3000)  # now on another card, where so many do not fit: halved, in its window
    assert facts(passed(tmp_path, {"": other}), "") == [
        (32_768, 2048),
        (other.tried[-1], 2048),
        (32_768, 2048),
    ]
    assert other.windows == [2048]
    assert other.tried == [32_768, 16_384, 8192, 4096, 2048]


def test_what_fits_at_one_checkpoint_is_not_looked_for_at_the_next(tmp_path: Path) -> None:
    first, second = Device(20_000), Device(20_000)
    done = passed(tmp_path, {"one": first, "two": second})
    assert facts(done, "one") == facts(done, "two")
    assert {*second.tried} == {facts(done, "one")[0][0]}
    assert len({*first.tried}) > 3


def test_what_is_set_is_neither_looked_for_nor_taken_over(tmp_path: Path) -> None:
    done = passed(tmp_path, {"": Device(10**9)}, window=512, batch_tokens=900)
    assert facts(done, "") == [(900, 512)] * 3
    done.shards()[1].path.unlink()
    again = passed(tmp_path, {"": Device(10**9)}, window=512, batch_tokens=300)
    assert facts(again, "") == [(900, 512), (300, 512), (900, 512)]


@pytest.mark.parametrize(
    ("num_examples", "window", "size"),
    [(1, "auto", 1024), (131_071, "auto", 1024), (131_072, "auto", 2048), (10**9, "auto", 4096),
     (10**9, 3000, 3000), (10**9, 1000, 4000), (23, 8, 1024), (10**9, 8192, 8192)],
)  # fmt: skip
def test_shards_leave_64_of_them_and_are_whole_windows(
    num_examples: int, window: int | str, size: int
) -> None:
    engine = EngineConfig(window=window)  # type: ignore[arg-type]
    assert shard_size(engine, num_examples) == size


def test_a_window_is_a_power_of_two_that_divides_its_shard() -> None:
    cuda, cpu, engine = torch.device("cuda"), torch.device("cpu"), EngineConfig()
    for tokens in (1, 300, 2048, 8192):
        assert window_size(engine, 65_536, tokens, cuda) == 1024
    found = [window_size(engine, 65_536, t, cuda) for t in (8200, 14_080, 16_400, 32_768)]
    assert found == [2048, 2048, 4096, 4096]
    assert window_size(engine, 65_536, 32_768, cpu) == 1024
    assert window_size(engine, 3 * 1024, 32_768, cuda) == 1024
    assert window_size(engine, 2048, 32_768, cuda) == 2048
    for device in (cuda, cpu):
        assert window_size(EngineConfig(window=7), 14, 32_768, device) == 7

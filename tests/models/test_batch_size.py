"""The most that fits is found from below; what did not fit is halved, and nothing else changes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from gradsift.config import EngineConfig
from gradsift.errors import ModelError
from gradsift.gradients.memory import memory_budget
from gradsift.models import batches
from gradsift.models.batch_size import fits, most_tokens, probe, start_tokens, within_memory
from gradsift.models.batches import lengths_of, make_batches, prefetch

CPU = torch.device("cpu")


@pytest.fixture
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what Python collects alone, which takes long."""
    monkeypatch.setattr("gradsift.models.batch_size.clear_device_cache", lambda **_: None)


def fails_above(limit: int, tried: list[int]):
    def work(max_tokens: int) -> str:
        tried.append(max_tokens)
        if max_tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return f"done with {max_tokens}"

    return work


def test_work_that_does_not_fit_is_done_again_with_half_the_tokens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[int] = []
    found = within_memory(fails_above(300, tried), 1000, np.array([20, 5]))
    assert (found, tried) == (("done with 250", 250), [1000, 500, 250])
    assert "out of memory; going on with batches of 250 tokens" in caplog.text


def test_what_never_fits_is_an_error_that_says_what_to_change() -> None:
    tried: list[int] = []
    message = (
        r"the longest of 20 tokens; lower data.max_length, lora.rank or engine.memory, .*2.00 GiB"
    )
    with pytest.raises(ModelError, match=message):
        within_memory(fails_above(0, tried), 100, np.array([20, 5]))
    assert tried == [100, 50, 25, 12, 6]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_every_way_to_say_it_is_understood(message: str) -> None:
    def work(max_tokens: int) -> int:
        if max_tokens > 50:
            raise RuntimeError(message)
        return max_tokens

    assert within_memory(work, 100, np.array([20])) == (50, 50)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(max_tokens: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        within_memory(broken, 100, np.array([20]))


@pytest.mark.parametrize("capacity", [5, 300, 2100, 3000, 9000, 16_000, 20_000, 30_000, 10**6])
@pytest.mark.parametrize("longest", [4, 2048])
@pytest.mark.usefixtures("_no_cache")
def test_the_search_finds_the_most_within_its_step_in_few_tries(
    capacity: int, longest: int
) -> None:
    tried: list[int] = []
    lengths, needed = np.array([4, longest]), 1 if capacity >= longest else 2  # of long ones
    most = most_tokens(fails_above(capacity, tried), lengths, 32_768)
    assert max(found for found in tried if found <= capacity) == most + most // 16
    assert most == 32_768 or most + most // 8 + 1 + most // 16 >= capacity - capacity // 16
    assert len(tried) <= (8 if capacity >= 2176 else 17 * needed)


@pytest.mark.usefixtures("_no_cache")
def test_the_search_begins_with_few_tokens() -> None:
    tried: list[int] = []
    assert most_tokens(fails_above(15_000, tried), np.array([300]), 32_768) == 13_312
    doubled, bisected = [2048, 4096, 8192, 16_384], [12_288, 14_336, 13_312]
    assert tried == [tokens + tokens // 16 for tokens in doubled + bisected]


def test_other_errors_end_the_search() -> None:
    def broken(max_tokens: int) -> None:
        raise RuntimeError("shapes do not match" if max_tokens > 3000 else "out of memory")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fits(broken, 3001)
    assert not fits(broken, 3000)


def test_the_probe_tries_the_longest_and_the_shortest(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tried = []

    def measure(examples: list, tokens: int) -> None:
        tried.append((tokens, len(examples), len(examples[0].input_ids) - 1))
        if tokens > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert probe(measure, np.array([30, 4, 12]), 512) == 176
    assert tried == [
        *((544, 18, 30), (272, 9, 30), (136, 4, 30), (136, 136, 1), (204, 6, 30)),
        *((170, 5, 30), (170, 170, 1), (187, 6, 30), (187, 187, 1)),
    ]
    said = [(r.levelname, r.message) for r in caplog.records]  # a search is expected to halve
    assert said == [
        ("INFO", f"out of memory; going on with batches of {tokens} tokens")
        for tokens in (256, 128)
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_halving_where_memory_really_runs_out() -> None:
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import tiny_models, torch
from math import prod
from gradsift.models import batches
from gradsift.gradients.basis import Basis
from gradsift.models.batch_size import within_memory
from gradsift.gradients.per_example import blocks
from gradsift.gradients.projection import project
from gradsift.models.batches import lengths_of
torch.set_num_threads(1)
batches.MAX_EXAMPLES = 10**6
model, examples = tiny_models.adapted("llama"), tiny_models.examples(400)
ones = {{name: torch.ones(2, prod(shape)) for name, shape in blocks(model).items()}}
basis = Basis(ones, frozenset(), model.device)
alone = project(model, examples, 50, basis).coordinates
many = examples * 200
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
found, tokens = within_memory(lambda t: project(model, many, t, basis), 2**21, lengths_of(many))
assert tokens < 2**21, tokens
assert (found.coordinates[:400] - alone).abs().max() < 1e-4 * alone.abs().max()
print("tokens", tokens)
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "out of memory; going on with batches of" in result.stderr


def test_items_are_made_ahead_on_another_thread_and_errors_come_through() -> None:
    threads = []

    def items() -> Iterator[int]:
        for number in range(3):
            threads.append(threading.current_thread())
            yield number
        raise ValueError("broken row")

    found = []
    with pytest.raises(ValueError, match="broken row"):
        found.extend(prefetch(items()))
    assert threading.current_thread() not in threads
    coming = prefetch(iter(range(100)))
    assert next(coming) == 0
    coming.close()  # and nothing hangs


def test_batches_are_copied_on_the_stream_of_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, copied = threading.local(), []
    place = torch.device("cuda", 1)

    @contextmanager
    def stream(wanted: str) -> Iterator[None]:
        chosen.stream = wanted
        yield
        del chosen.stream

    def copy(array: np.ndarray, device: torch.device) -> torch.Tensor:
        copied.append((getattr(chosen, "stream", "default"), threading.current_thread(), device))
        return torch.from_numpy(array)

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"{chosen.stream} on {device}")
    monkeypatch.setattr(batches, "to_device", copy)
    monkeypatch.setattr(batches, "device_of", lambda model: place)
    model, groups = tiny_models.build("llama"), [np.array([0]), np.array([1])]
    with stream("side"):
        [*_] = make_batches(model, tiny_models.examples(2), groups)
    assert {(where, device) for where, _, device in copied} == {("side on cuda:1", place)}
    assert threading.current_thread() not in {thread for _, thread, _ in copied}


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsift.gradients.memory.host_memory", lambda: 12 * 2**30)
    assert memory_budget(EngineConfig(), CPU) == 6 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory_budget(EngineConfig(), CPU) == 2 * 2**30


def test_what_is_set_is_taken_and_auto_is_worked_out() -> None:
    engine = EngineConfig(batch_tokens=77, memory="3GiB")
    assert start_tokens(engine, CPU) == 77
    assert memory_budget(engine, CPU) == 3 * 2**30
    assert start_tokens(EngineConfig(), CPU) == 2048
    assert memory_budget(EngineConfig(), CPU) > 2**20
    assert lengths_of(tiny_models.examples(3)).tolist() == [
        int(np.flatnonzero(e.supervised)[-1]) for e in tiny_models.examples(3)
    ]

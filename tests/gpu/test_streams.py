"""On CUDA: where a block of the basis lies changes no bit, whoever asks for it and however late.

An offloaded block is copied on a stream of its own while another computes. A missing wait shows now
and then only: so a thousand times (whole passes, each of some 1,300 launches, 250), with small
blocks, and with either stream held up on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
import torch

import tiny_models
from gradsift.gradients.basis import Basis
from gradsift.gradients.per_example import blocks
from gradsift.gradients.projection import product, project

pytestmark = pytest.mark.gpu

CYCLES = 100_000  # about 50 microseconds, longer than a small copy or product takes
LONG = 100_000_000  # about 50 milliseconds
DTYPES = [torch.float32, torch.bfloat16]
WAITING = [1, 3]  # every block, every third


def repeats(device: torch.device, on_a_gpu: int) -> int:
    return on_a_gpu if device.type == "cuda" else 20


def bases(model: torch.nn.Module, rank: int, device: torch.device, every: int) -> list[Basis]:
    """Return the same basis all on the device, and with some blocks waiting in host memory."""
    generator, dtype = torch.Generator().manual_seed(0), next(model.parameters()).dtype
    made = {
        name: torch.randn(rank, prod(shape), generator=generator).to(dtype)
        for name, shape in blocks(model).items()
    }
    waiting = frozenset([*made][::every])
    here = {name: block.to(device) for name, block in made.items()}
    pinned = {
        name: made[name].pin_memory() if device.type == "cuda" else made[name] for name in waiting
    }
    return [Basis(here, frozenset(), device), Basis(here | pinned, waiting, device)]


def hold_up(basis: Basis, number: int, device: torch.device) -> None:
    """Keep the stream that computes busy, or the one that copies, or neither."""
    if device.type != "cuda" or number % 3 == 0:
        return
    with torch.cuda.stream(basis._stream if number % 3 == 1 else torch.cuda.current_stream(device)):
        torch.cuda._sleep(CYCLES)


def products(
    rows: dict[str, torch.Tensor], basis: Basis, names: Sequence[str], lag: int | None
) -> torch.Tensor:
    """Ask for the blocks in this order, and multiply each as a pool pass does."""
    found = {}
    for name in names:
        if lag is not None:
            hold_up(basis, lag, rows[name].device)
        found[name] = product(rows[name], basis[name])
    return torch.stack([found[name] for name in rows])


# at rank 3 the second slot begins at an odd place, at rank 8 at a multiple of 256 bytes
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("every", WAITING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_asked_for_on_the_main_thread(
    dtype: torch.dtype, every: int, rank: int, device: torch.device
) -> None:
    model = tiny_models.adapted("llama", targets="all-linear", dtype=dtype, rank=4)
    here, waiting = bases(model, rank, device, every)
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    rows = {
        name: torch.randn(16, prod(shape), generator=generator).to(device, dtype)
        for name, shape in blocks(model).items()
    }
    expected = products(rows, here, [*rows], None)
    for number in range(repeats(device, 1000)):
        # mostly in order; now and then in another, so that what was foretold is wrong
        names = [*rows] if number % 10 else [str(name) for name in rng.permutation([*rows])]
        found = products(rows, waiting, names, number)
        assert torch.equal(found, expected), f"repeat {number}"


@pytest.mark.parametrize("every", WAITING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_coordinates_of_a_pool_pass_on_autograds_thread(
    dtype: torch.dtype, every: int, device: torch.device
) -> None:
    model = tiny_models.adapted("llama", targets="all-linear", dtype=dtype, rank=4)
    model.get_base_model().set_attn_implementation("eager")  # which adds up in a fixed order
    model, examples = model.to(device), tiny_models.examples(12, seed=2)
    here, waiting = bases(model, 8, device, every)
    expected = project(model, examples, 200, here).coordinates
    for number in range(3):  # else what follows says nothing of streams
        assert torch.equal(project(model, examples, 200, here).coordinates, expected), number
    for number in range(repeats(device, 250)):
        hold_up(waiting, number, device)
        found = project(model, examples, 200, waiting).coordinates
        assert torch.equal(found, expected), f"repeat {number}"


def test_memory_of_a_basis_that_goes_is_not_given_away_while_its_copy_runs(
    device: torch.device,
) -> None:
    model = tiny_models.adapted("llama", targets="all-linear", rank=4)
    name = next(iter(blocks(model)))
    for number in range(20):
        if device.type == "cuda":
            torch.cuda.empty_cache()  # so that hardly anything but the slots is free below
        _, waiting = bases(model, 8, device, 1)
        begin, shape = waiting._slots.data_ptr(), waiting._slots.shape
        end, released = begin + waiting._slots.nbytes, None
        if waiting._stream:
            with torch.cuda.stream(waiting._stream):
                torch.cuda._sleep(LONG)
            released = torch.cuda.current_stream(device).record_event()
        waiting._prefetch(name, released)  # which nothing that comes below waits for
        del waiting
        taken = [torch.zeros(shape, device=device) for _ in range(500)]  # 12 KiB each
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert not torch.stack(taken).any(), f"repeat {number}"
        # once copied, it is given away for such as these: they would have got it before
        taken += [torch.empty(shape, device=device) for _ in range(500)]
        again = any(begin <= tensor.data_ptr() < end for tensor in taken)
        assert again or device.type == "cpu", f"repeat {number} proves nothing"
        del taken

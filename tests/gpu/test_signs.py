"""On CUDA: the kernel of LESS's projection has the CPU's signs, float32's products, and speed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from gradsift.gradients.random_projection import Projection, has_kernel

pytestmark = pytest.mark.gpu

ROWS, PARAMETERS, DIRECTIONS = 64, 128 * 4096, 8192  # of one LoRA matrix of 7B at rank 128


@pytest.fixture(autouse=True)
def kernel(device: torch.device) -> None:
    if device.type == "cuda" and not has_kernel(device):
        pytest.skip("needs an NVIDIA card from Ampere on, Triton and a C compiler")


@pytest.mark.parametrize(("dimension", "count"), [(64, 70), (192, 300), (8192, 130)])
def test_signs_are_those_of_the_cpu(device: torch.device, dimension: int, count: int) -> None:
    here, there = (Projection(dimension, seed=3, device=d) for d in (device, torch.device("cpu")))
    first = (1 << 33) + 5
    found = torch.zeros(count, dimension, device=device)
    here.add(torch.eye(count, device=device), first, found)
    assert torch.equal(found.cpu().sign(), there.signs(first, first + count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 20, 40, 70, 300])
def test_products_are_as_exact_as_float32_and_repeat_their_bits(
    device: torch.device, num_rows: int, dtype: torch.dtype, figure: Callable[..., None]
) -> None:
    projection = Projection(192, seed=5, device=device)
    generator = torch.Generator().manual_seed(num_rows)
    size = 140_001 if device.type == "cuda" else 3_001
    rows = torch.randn(num_rows, size, generator=generator).to(device, dtype)
    found, again = torch.zeros(2, num_rows, 192, device=device)
    for into in (found, again):
        projection.add(rows.float(), 7, into)
    assert torch.equal(found, again)
    expected = rows.double() @ projection.signs(7, 7 + size).double() * 192**-0.5
    lengths = rows.double().norm(dim=1, keepdim=True)
    error = float(((found - expected) / lengths).abs().max())
    figure(error=error)
    assert error < 1e-6


def test_signs_made_in_the_kernel_take_less_time(
    device: torch.device, figure: Callable[..., None]
) -> None:
    size = PARAMETERS if device.type == "cuda" else 2048
    rows = torch.randn(ROWS, size, device=device)
    projection, took = Projection(DIRECTIONS, seed=0, device=device), {}
    for in_kernel in (projection.in_kernel, False):
        projection.in_kernel = in_kernel
        into = torch.zeros(ROWS, DIRECTIONS, device=device)
        for _ in range(3):  # the first time compiles
            started = time.perf_counter()
            projection.add(rows, 0, into)
            into[0, 0].item()
            took[in_kernel] = time.perf_counter() - started
    operations = 2 * ROWS * size * DIRECTIONS
    figure(**{f"flops_in_kernel_{key}": operations / value for key, value in took.items()})
    assert device.type != "cuda" or took[True] < took[False]

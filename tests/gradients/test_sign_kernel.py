"""The kernel of the random projection, in Triton's interpreter: signs to the bit, exact products.

The interpreter runs on the CPU and has no bfloat16 products: there the three parts of a number are
multiplied as float32. What a card makes of them is in `tests/gpu/test_signs.py`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gradsift.gradients.random_projection import Projection

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: `make extras` runs it")
    if os.getenv("TRITON_INTERPRET") != "1":  # from before the first import of torch on
        pytest.skip("needs TRITON_INTERPRET=1: `make extras` runs it")
    from gradsift.gradients import sign_kernel

    return sign_kernel


def project(kernel: ModuleType, projection: Projection, rows: Tensor, first: int) -> Tensor:
    into = torch.zeros(len(rows), projection.dimension)
    for _ in range(2):  # the second time to what is there
        kernel.add_product(rows, first, projection._start, into)
    return into / 2


@pytest.mark.parametrize(
    ("dimension", "first", "count"), [(64, 0, 70), (192, 1, 17), (256, 1 << 33, 5), (4096, 77, 3)]
)
def test_signs_are_those_made_in_memory(
    kernel: ModuleType, dimension: int, first: int, count: int
) -> None:
    projection = Projection(dimension, seed=3, device=CPU)
    found = project(kernel, projection, torch.eye(count), first)
    assert torch.equal(found.sign(), projection.signs(first, first + count))
    torch.testing.assert_close(found.abs(), torch.full_like(found, dimension**-0.5))


@pytest.mark.parametrize(
    ("num_rows", "size", "dtype"),
    [
        (1, 1, torch.float32),
        (5, 4200, torch.float32),  # of two programs
        (70, 67, torch.float32),
        (5, 67, torch.bfloat16),
        (5, 67, torch.float16),
    ],
)
def test_products_are_as_exact_as_float32(
    kernel: ModuleType, num_rows: int, size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(num_rows, size, generator=generator)
    rows *= 10 ** torch.empty(num_rows, 1).uniform_(-4, 4, generator=generator)
    rows = rows.to(dtype)
    projection = Projection(64, seed=5, device=CPU)
    found = project(kernel, projection, rows, 99) / rows.double().norm(dim=1, keepdim=True)
    signs = projection.signs(99, 99 + size).double()
    expected = rows.double() @ signs / 8 / rows.double().norm(dim=1, keepdim=True)
    assert float((found - expected).abs().max()) < 1e-6


def test_rows_that_lie_apart_in_memory_and_many_stretches_change_nothing(
    kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).T
    projection = Projection(64, seed=5, device=CPU)
    plain = project(kernel, projection, rows.contiguous(), 0)
    monkeypatch.setattr(kernel, "_STRETCH", 32)
    monkeypatch.setattr(kernel, "_STRETCHES", 2)
    torch.testing.assert_close(project(kernel, projection, rows, 0), plain, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, which the interpreter calls
def test_what_is_not_finite_stays_so(kernel: ModuleType) -> None:
    rows = torch.ones(3, 80)
    rows[0, 70], rows[1, 3] = float("inf"), float("nan")
    found = project(kernel, Projection(64, seed=5, device=CPU), rows, 0)
    assert found.isfinite().any(dim=1).tolist() == [False, False, True]

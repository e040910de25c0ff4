"""Padding and the choice of kernels change the shapes that a GPU sees, and no result."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from gradsift.config import ModelConfig
from gradsift.gradients.per_example import each_batch, gradient_rows
from gradsift.models import batches
from gradsift.models.batches import (
    Batch,
    group_examples,
    lengths_of,
    make_batches,
    padded,
    plan_batches,
)
from gradsift.models.forward import run_forward
from gradsift.models.kernels import multiply_in_tf32, precision_of
from gradsift.models.loading import load_base, resolve_dtype

CPU = torch.device("cpu")
CUDA = torch.backends.cuda


@pytest.fixture
def eights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pad on the CPU as on a GPU."""
    monkeypatch.setitem(batches._MULTIPLES, "cpu", 8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_padding_changes_no_result_beyond_rounding(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.adapted(family, dtype=torch.float64)
    examples = tiny_models.examples(12, seed=4)
    rows, outputs = gradient_rows(model, examples, 60), run_forward(model, examples, 90)
    shapes = record_shapes(monkeypatch)
    monkeypatch.setitem(batches._MULTIPLES, "cpu", 8)
    others, filled = gradient_rows(model, examples, 60), run_forward(model, examples, 90)
    assert len(shapes) > 5
    assert not any(width % 8 for _, width in shapes)
    for name, row in rows.items():
        torch.testing.assert_close(others[name], row, rtol=0, atol=3e-7 * row.abs().max().item())
    torch.testing.assert_close(filled.losses, outputs.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(filled.hidden, outputs.hidden, rtol=0, atol=1e-6)


def record_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that fills with the shapes of the batches that are laid out."""
    shapes, plain = [], Batch.of

    def of(*args: object) -> Batch:
        batch = plain(*args)  # type: ignore[arg-type]
        shapes.append(tuple(batch.input_ids.shape))
        return batch

    monkeypatch.setattr(Batch, "of", of)
    return shapes


@pytest.mark.usefixtures("eights")
@pytest.mark.parametrize("max_tokens", [24, 100, 333])
def test_a_padded_batch_keeps_to_the_budget(max_tokens: int) -> None:
    model, examples = tiny_models.build("llama"), tiny_models.examples(60, seed=2)
    groups = group_examples(model, examples, max_tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(60))
    shapes = [tuple(batch.input_ids.shape) for batch in make_batches(model, examples, groups)]
    assert all(count == 1 or count * width <= max_tokens for count, width in shapes)
    assert not any(width % 8 for _, width in shapes)


@pytest.mark.usefixtures("eights")
def test_padding_never_goes_beyond_the_positions_that_a_model_has() -> None:
    model = tiny_models.adapted("gpt2")
    model.config.n_positions = 37
    transformer = model.get_base_model().transformer
    transformer.wpe = torch.nn.Embedding.from_pretrained(transformer.wpe.weight[:37])
    assert padded(model, np.array([1, 8, 30, 32, 33, 37])).tolist() == [8, 8, 32, 32, 33, 37]
    examples = [e for e in tiny_models.examples(40, seed=3) if len(e.input_ids) <= 37]
    assert lengths_of(examples).max() > 32
    found = gradient_rows(model, examples, 200)  # an index out of range where it did
    assert all(rows.isfinite().all() for rows in found.values())


def test_on_a_cpu_lengths_stay_as_they_are() -> None:
    model, examples = tiny_models.build("llama"), tiny_models.examples(9)
    lengths = lengths_of(examples)
    assert padded(model, lengths).tolist() == lengths.tolist()
    [batch] = make_batches(model, examples, [np.arange(9)])
    assert batch.input_ids.shape == (9, lengths.max())
    pad = partial(padded, model)
    assert torch.equal(Batch.of(examples, CPU, pad=pad).input_ids, batch.input_ids)


@pytest.fixture(params=["newer", "older", "for all"])
def set_by_user(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process whose user has let PyTorch multiply in TF32, in one of the ways to say so."""
    if request.param == "newer":
        CUDA.matmul.fp32_precision = "tf32"
    elif request.param == "older":
        CUDA.matmul.allow_tf32 = True
    else:
        torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")
    for products in (CUDA.matmul, torch.backends.mkldnn.matmul):
        products.fp32_precision = "none"


def kernels() -> tuple[str, bool]:
    return CUDA.matmul.fp32_precision, CUDA.cudnn_sdp_enabled()


def all_ways_to_ask() -> list[object]:
    found: list[object] = [torch.backends.mkldnn.matmul.fp32_precision, *kernels()]
    for older in (torch.get_float32_matmul_precision, lambda: CUDA.matmul.allow_tf32):
        try:
            found.append(older())
        except RuntimeError as error:  # of a user who has set the newer one alone
            found.append(str(error).partition("\n")[0])
    return found


@pytest.mark.usefixtures("set_by_user")
def test_kernels_are_the_batches_own_while_they_run_and_the_users_again_afterwards() -> None:
    model, examples = tiny_models.adapted("llama"), tiny_models.examples(2)
    groups, before = [np.array([0]), np.array([1])], all_ways_to_ask()
    own = ["ieee", "ieee", False, "highest", False]
    assert before[1:3] == ["tf32", True]
    assert [all_ways_to_ask() for _ in make_batches(model, examples, groups)] == [own] * 2
    assert all_ways_to_ask() == before
    coming = each_batch(model, examples, groups)
    next(coming)
    assert all_ways_to_ask() == own
    coming.close()  # what an error in a batch comes to
    assert all_ways_to_ask() == before


def test_a_model_in_tf32_is_multiplied_so_in_its_batches_alone() -> None:
    model, examples = tiny_models.adapted("llama"), tiny_models.examples(2)
    assert precision_of(model) == "float32"
    multiply_in_tf32(model.get_base_model())
    assert precision_of(model) == "tf32"
    assert [kernels()[0] for _ in make_batches(model, examples, [np.arange(2)])] == ["tf32"]
    assert kernels()[0] == "none"
    assert precision_of(tiny_models.build("llama", dtype=torch.bfloat16)) == "bfloat16"


def test_tf32_is_float32_on_a_cpu(tmp_path: Path) -> None:
    tiny_models.build("llama").save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), dtype="tf32", device="cpu")
    assert resolve_dtype(config) == torch.float32
    assert precision_of(load_base(config)) == "float32"


def test_no_other_cut_of_the_sorted_examples_costs_less() -> None:
    lengths = np.random.default_rng(3).integers(1, 200, size=9)
    ordered = sorted(lengths.tolist(), reverse=True)

    def cost(sizes: tuple[int, ...]) -> float:
        starts = np.cumsum((0, *sizes[:-1]))
        padded_tokens = [ordered[s] * n for s, n in zip(starts, sizes, strict=True)]
        fits = all(t <= 500 or n == 1 for t, n in zip(padded_tokens, sizes, strict=True))
        return sum(padded_tokens) + 128 * len(sizes) if fits else float("inf")

    cuts = [
        tuple(np.diff((0, *inner, 9)).tolist())
        for count in range(9)
        for inner in combinations(range(1, 9), count)
    ]
    found = tuple(len(group) for group in plan_batches(lengths, max_tokens=500))
    assert cost(found) == min(map(cost, cuts))
    assert 1 < len(found) < 9

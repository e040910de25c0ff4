"""Hessian products, eigenpairs and estimates against the full Hessian in float64."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_models
from gradsift.data.encoding import Encoded
from gradsift.errors import ConfigError
from gradsift.gradients.hessian import (
    Hessian,
    check_eigenvectors,
    entries,
    leading_eigenpairs,
    measure_coupling,
    sines,
)
from gradsift.gradients.per_example import blocks
from gradsift.models.lora import lora_pairs

EXAMPLES = tiny_models.examples(5, longest=12)
WEIGHTS = np.array([0.4, 0.1, 0.2, 0.2, 0.1])


def full_hessian(
    model: torch.nn.Module, examples: Sequence[Encoded], weights: np.ndarray
) -> Tensor:
    """Return the Hessian as a matrix: one example at a time, some rows at a time, autograd."""
    parameters = [m.weight.requires_grad_() for pair in lora_pairs(model).values() for m in pair]
    total = torch.zeros((), dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for example, weight in zip(examples, weights, strict=True):
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            logits = model(input_ids=ids).logits[0, :-1]
            nll = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            total = total + weight * nll[torch.from_numpy(example.supervised[1:])].mean()
    gradient = torch.autograd.grad(total, parameters, create_graph=True)
    flat = torch.cat([part.flatten() for part in gradient])
    found = []
    for units in torch.eye(len(flat), dtype=flat.dtype).split(64):
        rows = torch.autograd.grad(
            flat, parameters, units, retain_graph=True, is_grads_batched=True
        )
        found.append(torch.cat([part.flatten(1) for part in rows], dim=1))
    return torch.cat(found).detach()


@pytest.fixture(scope="module")
def truth() -> tuple[Hessian, Tensor]:
    model = tiny_models.adapted("llama", dtype=torch.float64, rank=2)
    matrix = full_hessian(model, EXAMPLES, WEIGHTS)
    model.requires_grad_(False)
    return Hessian(model, EXAMPLES, WEIGHTS, max_tokens=30), matrix


def test_products_are_those_of_the_full_matrix(truth: tuple[Hessian, Tensor]) -> None:
    hessian, matrix = truth
    vectors = torch.randn(3, hessian.size, dtype=torch.float64)
    torch.testing.assert_close(hessian(vectors), vectors @ matrix, rtol=1e-4, atol=2e-5)
    name = next(iter(hessian.slices))
    alone = torch.zeros_like(vectors[:1])
    alone[:, hessian.slices[name]] = 1
    found = hessian(alone, rows=[name])
    own = hessian.slices[name]
    torch.testing.assert_close(found[:, own], (alone @ matrix)[:, own], rtol=1e-4, atol=2e-5)
    assert found.count_nonzero() <= hessian.slices[name].stop
    assert (hessian(torch.zeros(1, hessian.size)) == 0).all()


def test_eigenpairs_are_those_of_the_full_matrix(truth: tuple[Hessian, Tensor]) -> None:
    hessian, matrix = truth
    values, vectors = leading_eigenpairs(hessian, 4, seed=0, memory=2**20)
    exact = np.linalg.eigvalsh(matrix.numpy())
    exact = exact[np.argsort(-np.abs(exact))][:4]
    np.testing.assert_allclose(values, exact, rtol=0.02)
    residual = matrix.numpy() @ vectors.T - vectors.T * values
    assert np.linalg.norm(residual, axis=0).max() < 0.02 * abs(values[0])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(4), atol=1e-6)
    assert vectors.dtype == np.float32


@pytest.mark.slow
def test_eigenpairs_at_a_fresh_adapter_where_b_is_zero() -> None:
    """Nothing curves in A alone; what curves between A and B lies in few directions."""
    model = tiny_models.adapted("llama", dtype=torch.float64, rank=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    one = EXAMPLES[:1]
    hessian = Hessian(model, one, np.ones(1), max_tokens=30)
    values, _ = leading_eigenpairs(hessian, 40, seed=0, memory=0)
    matrix = full_hessian(model, one, np.ones(1))
    exact = np.linalg.eigvalsh(matrix.numpy())
    exact = exact[np.argsort(-np.abs(exact))][:40]
    np.testing.assert_allclose(np.abs(values), np.abs(exact), rtol=0.02, atol=1e-4 * abs(exact[0]))


def test_vectors_lie_on_the_device_if_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Hessian):
        def __init__(self) -> None:
            self.size, self.device = 50, torch.device("meta")

    found = []

    def noted(*arguments: object) -> tuple[np.ndarray, Tensor]:
        found.append(arguments[-1])
        return np.ones(1), torch.ones(1, 50)

    monkeypatch.setattr("gradsift.gradients.hessian.largest_eigenpairs", noted)
    for memory in (4 * 50 * 21, 4 * 50 * 21 - 1):
        leading_eigenpairs(Elsewhere(), 5, seed=0, memory=memory)
    assert found == [torch.device("meta"), torch.device("cpu")]


@pytest.mark.slow
def test_coupling_is_that_of_the_full_matrix_within_its_error(
    truth: tuple[Hessian, Tensor],
) -> None:
    hessian, tensor = truth
    matrix = tensor.numpy()
    coupling = measure_coupling(hessian, num_probes=24, seed=0)
    total, names = (matrix**2).sum(), [*hessian.slices]
    layers = [name.rpartition(".")[0] for name in names]
    mass = np.array(
        [
            [(matrix[a, b] ** 2).sum() for b in hessian.slices.values()]
            for a in hessian.slices.values()
        ]
    )
    same = np.array(layers)[:, None] == np.array(layers)
    cross = (mass * same).sum() - np.trace(mass)
    for found, exact in (
        (coupling.off_diagonal, 1 - (np.diag(matrix) ** 2).sum() / total),
        (coupling.cross, cross / total),
        (coupling.between_layers, (mass * ~same).sum() / total),
    ):
        assert 0 < found.standard_error < 0.1
        assert abs(found.value - exact) < 4 * found.standard_error, (found, exact)
    for layer, found in coupling.layers.items():
        own = [i for i, name in enumerate(layers) if name == layer]
        exact = 2 * mass[own[0], own[1]] / mass[np.ix_(own, own)].sum()
        assert abs(found.value - exact) < max(4 * found.standard_error, 0.02), (layer, found, exact)
    np.testing.assert_allclose(coupling.masses.sum(), total, rtol=0.1)


def test_a_diagonal_hessian_has_no_coupling() -> None:
    class Diagonal(Hessian):
        def __init__(self) -> None:
            self.size, self.slices = 6, {"x.A": slice(0, 2), "x.B": slice(2, 6)}
            self.device = torch.device("cpu")

        def __call__(self, vectors: Tensor, rows: Collection[str] = ()) -> Tensor:
            return vectors * torch.arange(1.0, 7.0)

    coupling = measure_coupling(Diagonal(), num_probes=3, seed=0)
    assert coupling.off_diagonal.value == pytest.approx(0, abs=1e-12)
    assert coupling.off_diagonal.standard_error == pytest.approx(0, abs=1e-9)
    assert coupling.layers["x"].value == 0


def test_entries_are_those_of_the_full_matrix(truth: tuple[Hessian, Tensor]) -> None:
    hessian, matrix = truth
    layer = "model.layers.1.self_attn.v_proj"
    found, labels = entries(hessian, layer, per_block=3)
    a, b = hessian.slices[f"{layer}.A"], hessian.slices[f"{layer}.B"]
    rows = [a.start, (a.start + a.stop - 1) // 2, a.stop - 1]
    rows += [b.start, (b.start + b.stop - 1) // 2, b.stop - 1]
    np.testing.assert_allclose(found, matrix.numpy()[np.ix_(rows, rows)], rtol=1e-4, atol=1e-6)
    assert labels[0] == "A[0,0]"
    shape = blocks(tiny_models.adapted("llama", rank=2))[f"{layer}.B"]
    assert labels[-1] == f"B[{shape[0] - 1},{shape[1] - 1}]"


def test_sines_of_a_space_with_itself_and_with_its_complement() -> None:
    np.testing.assert_allclose(sines(np.eye(3)), 0, atol=1e-7)
    np.testing.assert_allclose(sines(np.zeros((3, 2))), 1)


def test_more_eigenvectors_than_there_can_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_eigenvectors(10, 1000, memory=2**20)
    with pytest.raises(ConfigError, match="asked for 20 eigenvectors of a Hessian over 20 param"):
        check_eigenvectors(20, 20, memory=2**20)

    def check(count: int, device: int, host: int) -> None:
        """Look for `count` where so many vectors fit: needed are 2 count + 2, or 21 if more."""
        monkeypatch.setattr("gradsift.gradients.hessian.host_memory", lambda: 4 * 1000 * host)
        check_eigenvectors(count, 1000, memory=4 * 1000 * device)

    check(20, device=42, host=0)
    check(20, device=0, host=42)
    with pytest.raises(ConfigError, match="ask for at most 19 "):
        check(20, device=41, host=30)
    check(19, device=41, host=30)
    with pytest.raises(ConfigError, match="ask for at most 14 "):
        check(20, device=0, host=31)
    with pytest.raises(ConfigError, match="even one needs more than there is"):
        check(1, device=20, host=1)

"""On CUDA: coordinates are those of the plain loop, and bfloat16 ranks as float32 does."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import reference
import tiny_models
from gradients.test_families import ATTENTIONS, CASES, EXPERTS, adapted, relative
from gradsift.gradients.basis import Basis, build_basis
from gradsift.gradients.gram import gram_matrix
from gradsift.gradients.per_example import blocks
from gradsift.gradients.projection import Projections, project
from gradsift.gradients.subspace import fit_subspace

pytestmark = pytest.mark.gpu

PLAIN = [("llama", "sdpa", "all-linear"), ("qwen2", "sdpa", "all-linear"),
         ("mistral", "sdpa", "attention"), ("gpt2", "sdpa", "attention")]  # fmt: skip
TOKENS = 200  # several batches of several examples
AMPLE = 10**9


@pytest.mark.parametrize(("family", "attention", "targets"), [*CASES, *PLAIN])
def test_coordinates_equal_the_plain_loop_in_float32(
    family: str, attention: str, targets: str, device: torch.device, figure: Callable[..., None]
) -> None:
    examples = tiny_models.examples(20, seed=4)
    plain = adapted(family, attention, targets, torch.float64)
    rows = reference.gradient_rows(plain, examples)
    losses = torch.stack([reference.loss(plain, example).detach() for example in examples])

    model = adapted(family, attention, targets).to(device)
    generator = torch.Generator().manual_seed(3)
    basis = {n: torch.randn(8, prod(s), generator=generator) for n, s in blocks(model).items()}
    on_device = Basis({n: b.to(device) for n, b in basis.items()}, frozenset(), device)
    found = project(model, examples, TOKENS, on_device)

    expected = rows @ torch.cat([basis[name] for name in blocks(model)], dim=1).double().T
    errors = {
        "coordinates": relative(found.coordinates.cpu(), expected),
        "norms": relative(found.gradient_norms.cpu(), rows.norm(dim=1)),
        "losses": relative(found.losses.cpu(), losses),
    }
    figure(**errors)
    assert max(errors.values()) <= 1e-4


def projections(
    dtype: torch.dtype, device: torch.device, family: str, attention: str
) -> tuple[Projections, torch.Tensor]:
    """Return what is found of a pool, and of the target in the same basis, all in one precision."""
    model = adapted(family, attention, dtype=dtype).to(device)
    pool, target = tiny_models.examples(200, seed=7), tiny_models.examples(12, seed=8)
    gram = gram_matrix(model, target, TOKENS, AMPLE)
    subspace = fit_subspace(gram, 6, str(dtype).removeprefix("torch."))
    basis = build_basis(model, [(target, subspace.combination)], TOKENS, AMPLE)
    return project(model, pool, TOKENS, basis), torch.from_numpy(subspace.coordinates)


def best_cosines(found: Projections, target: torch.Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize
    cosines = unit(found.coordinates.double().cpu()) @ unit(target.double()).T
    return cosines.max(dim=1).values.numpy()


def test_the_same_examples_are_best_as_in_the_plain_loop(device: torch.device) -> None:
    pool, target = tiny_models.examples(200, seed=7), tiny_models.examples(12, seed=8)
    plain = adapted("llama", "sdpa", dtype=torch.float64)
    rows = (reference.gradient_rows(plain, own) for own in (target, pool))
    _, _, expected = reference.select(*rows, rank=6)
    found = best_cosines(*projections(torch.float32, device, "llama", "sdpa"))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    top = [set(np.argsort(-scores, kind="stable")[:10]) for scores in (found, expected.numpy())]
    assert top[0] == top[1]


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "sdpa"), *((f, a[0]) for f, a in ATTENTIONS.items() if f != EXPERTS)],
)
def test_bfloat16_is_as_near_to_float32_as_on_a_cpu(
    family: str, attention: str, device: torch.device, figure: Callable[..., None]
) -> None:
    # of random weights this large bfloat16 asks more than of a trained model (see test_runs.py)
    found = {}
    for place in (torch.device("cpu"), device):
        one, other = (
            best_cosines(*projections(dtype, place, family, attention))
            for dtype in (torch.float32, torch.bfloat16)
        )
        found[place.type] = float(spearmanr(one, other).statistic)
    figure(**{f"spearman_{name}": value for name, value in found.items()})
    assert found[device.type] >= found["cpu"] - 0.01

"""Batched gradients against the plain loop, and the laws of batching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reference
import tiny_models
from gradsift.gradients.basis import build_basis
from gradsift.gradients.gram import gram_matrix
from gradsift.gradients.per_example import PerExampleGradients, blocks
from gradsift.gradients.projection import project
from gradsift.gradients.subspace import fit_subspace
from gradsift.models.batches import Batch, plan_batches
from gradsift.models.losses import token_losses

MEMORY = 10**9
CASES = [
    (family, tied, targets)
    for family in ("llama", "qwen2", "mistral", "gpt2")
    for tied in (False, True)
    for targets in ("attention", "all-linear")
]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("family", "tied", "targets"), CASES)
def test_coordinates_and_scores_equal_the_plain_loop(family: str, tied: bool, targets: str) -> None:
    # seeds without nearly equal singular values: there coordinates turn, though no score does
    target, pool = tiny_models.examples(20, seed=3), tiny_models.examples(60, seed=2)
    plain = tiny_models.adapted(family, tied, targets, torch.float64)
    target_rows = reference.gradient_rows(plain, target)
    pool_rows = reference.gradient_rows(plain, pool)
    coordinates, references, scores = reference.select(target_rows, pool_rows)

    model = tiny_models.adapted(family, tied, targets)
    subspace = fit_subspace(gram_matrix(model, target, max_tokens=150, memory=MEMORY), "auto")
    basis = build_basis(model, [(target, subspace.combination)], max_tokens=150, memory=MEMORY)
    found = project(model, pool, 150, basis)

    assert subspace.rank == references.shape[1]
    signs = torch.sign((torch.from_numpy(subspace.coordinates) * references).sum(0))
    assert relative(torch.from_numpy(subspace.coordinates) * signs, references) < 1e-4
    assert relative(found.coordinates * signs, coordinates) < 1e-4
    assert relative(found.gradient_norms, pool_rows.norm(dim=1)) < 1e-4
    losses = torch.stack([reference.loss(plain, example) for example in pool])
    assert relative(found.losses, losses) < 1e-5
    cosines = (
        F.normalize(found.coordinates.double())
        @ F.normalize(torch.from_numpy(subspace.coordinates)).T
    )
    found_scores = cosines.max(dim=1).values
    assert relative(found_scores, scores) < 1e-4
    order = torch.argsort(found_scores, descending=True)[:6]
    assert scores[order].min() >= torch.sort(scores, descending=True).values[5] - 1e-5


def test_losses_and_their_gradient_equal_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsift.models.losses._LOGITS_AT_ONCE", 50)  # several pieces
    logits = torch.randn(17, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels, weights = torch.arange(17) % 11, torch.linspace(0.1, 2, 17)
    found = token_losses(logits, labels)
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((x * weights).sum(), logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_every_block_is_handed_on_once_and_nothing_is_left_behind() -> None:
    model = tiny_models.adapted("llama", targets="all-linear")
    batch = Batch.of(tiny_models.examples(3), torch.device("cpu"))
    seen: list[str] = []
    with PerExampleGradients(model) as gradients:
        gradients(batch, lambda name, gradient: seen.append(name))
    assert sorted(seen) == sorted(blocks(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_batch_holds_what_leads_up_to_the_last_label() -> None:
    example = tiny_models.examples(1)[0]
    last = int(np.flatnonzero(example.supervised)[-1])
    batch = Batch.of([example], torch.device("cpu"))
    assert batch.input_ids.tolist() == [example.input_ids[:last].tolist()]
    assert batch.weights.sum().item() == pytest.approx(1)
    assert batch.labels.tolist() == example.input_ids[example.supervised].tolist()


@pytest.mark.parametrize("max_tokens", [1, 50, 300])
def test_batches_cover_every_example_within_the_budget(max_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, size=200)
    groups = plan_batches(lengths, max_tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(200))
    for group in groups:
        assert len(group) == 1 or lengths[group].max() * len(group) <= max_tokens

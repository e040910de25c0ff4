"""Families of models: what each has of its own (caps, windows, experts) leaves gradients exact."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import models
import reference
from gradsift.batches import Batch
from gradsift.data import Encoded
from gradsift.gradients import PerExampleGradients

ATTENTIONS = {
    "qwen3": ("sdpa", "eager"),
    "gemma2": ("eager",),  # transformers refuses sdpa, which knows no cap
    "gemma3_text": ("sdpa", "eager"),
    "phi3": ("sdpa", "eager"),
    "olmo2": ("sdpa", "eager"),
    "gpt_neox": ("sdpa", "eager"),
    "qwen3_moe": ("sdpa", "eager"),
}
DENSE = [family for family in ATTENTIONS if family != "qwen3_moe"]
CASES = [
    (family, targets, attention)
    for family, attentions in ATTENTIONS.items()
    for targets in ("attention", "all-linear")[: 2 if family in DENSE else 1]
    for attention in attentions
]


def batched(model: nn.Module, examples: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Whole rows in the reference's order, and losses, of one padded batch."""
    found: dict[str, Tensor] = {}
    with PerExampleGradients(model) as gradients:
        losses = gradients(
            Batch.of(examples, torch.device("cpu")),
            lambda block, gradient: found.update({block: gradient.flatten(1).clone()}),
        )
    rows = [
        found.pop(name.removeprefix("base_model.model.").replace(f".lora_{x}.default.weight", f".{x}"))
        for name in reference.lora_parameters(model)
        for x in ("A" if ".lora_A." in name else "B",)
    ]
    assert not found
    return torch.cat(rows, 1), losses


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def adapted(family: str, targets: str, attention: str, dtype: torch.dtype) -> nn.Module:
    model = models.adapted(family, targets=targets, dtype=dtype)
    model.get_base_model().set_attn_implementation(attention)
    return model


@pytest.mark.parametrize(("family", "targets", "attention"), CASES)
def test_rows_and_losses_equal_the_plain_loop(family: str, targets: str, attention: str) -> None:
    examples = models.examples(6, seed=4)
    plain = adapted(family, targets, attention, torch.float64)
    rows, losses = batched(adapted(family, targets, attention, torch.float32), examples)
    expected = reference.gradient_rows(plain, examples)
    print(relative(rows, expected), relative(losses, torch.stack([reference.loss(plain, e) for e in examples])))
    for row, wanted in zip(rows, expected, strict=True):
        assert relative(row, wanted) < 1e-4
    assert relative(losses, torch.stack([reference.loss(plain, e) for e in examples])) < 1e-5

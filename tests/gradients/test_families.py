"""Families of models: their windows, caps, shared tensors and experts leave gradients exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import reference
import tiny_models
from gradsift.data.encoding import Encoded
from gradsift.gradients.per_example import PerExampleGradients
from gradsift.models.batches import Batch
from gradsift.models.last_layer import modules_after_attention

EXPERTS = "qwen3_moe"
ATTENTIONS = {
    "qwen3": ("sdpa", "eager"),
    "gemma2": ("eager",),
    "gemma3_text": ("sdpa", "eager"),
    "phi3": ("sdpa", "eager"),
    "olmo2": ("sdpa", "eager"),
    "gpt_neox": ("sdpa", "eager"),
    EXPERTS: ("sdpa", "eager"),
}
CASES = [
    (family, attention, targets)
    for family, attentions in ATTENTIONS.items()
    for attention in attentions
    for targets in ("attention", "all-linear")
    if (family, targets) != (EXPERTS, "all-linear")  # PEFT would adapt the experts
]


def adapted(
    family: str, attention: str, targets: str = "attention", dtype: torch.dtype = torch.float32
) -> peft.PeftModel:
    model = tiny_models.adapted(family, targets=targets, dtype=dtype)
    base = model.get_base_model()
    base.set_attn_implementation(attention)
    if family == EXPERTS and dtype == torch.float64:  # the default, grouped_mm, stops at float32
        base.set_experts_implementation("eager")
    return model


def in_one_batch(model: nn.Module, examples: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Whole rows, laid out as the reference's, and losses."""
    found: dict[str, Tensor] = {}

    def keep(block: str, gradient: Tensor) -> None:
        assert block not in found
        found[block] = gradient.flatten(1).clone()

    with PerExampleGradients(model) as gradients:
        losses = gradients(Batch.of(examples, torch.device("cpu")), keep)
    names = [
        parameter.removeprefix("base_model.model.")
        .removesuffix(".default.weight")
        .replace(".lora_", ".")
        for parameter in reference.lora_parameters(model)
    ]
    assert sorted(found) == sorted(names)
    return torch.cat([found[name] for name in names], dim=1), losses


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("family", "attention", "targets"), CASES)
def test_rows_and_losses_equal_the_plain_loop(family: str, attention: str, targets: str) -> None:
    examples = tiny_models.examples(6, seed=4)
    assert max(len(example.input_ids) for example in examples) > 3 * 8  # windows are of 8 tokens
    plain = adapted(family, attention, targets, torch.float64)
    expected = reference.gradient_rows(plain, examples)
    losses = torch.stack([reference.loss(plain, example).detach() for example in examples])

    found, found_losses = in_one_batch(adapted(family, attention, targets), examples)

    for row, wanted in zip(found, expected, strict=True):
        assert relative(row, wanted) <= 1e-4
    assert relative(found_losses, losses) <= 1e-5


@pytest.mark.parametrize(("family", "attention"), sorted({case[:2] for case in CASES}))
def test_neither_padding_nor_batch_mates_leak(family: str, attention: str) -> None:
    model, (short, long) = adapted(family, attention), short_and_long()
    alone, alone_loss = in_one_batch(model, [short])
    together, losses = in_one_batch(model, [long, short])
    assert relative(together[1], alone[0].double()) <= 1e-5
    assert relative(losses[1], alone_loss[0].double()) <= 1e-6


def test_tokens_go_to_the_experts_they_go_to_alone() -> None:
    model, (short, long) = adapted(EXPERTS, "sdpa"), short_and_long()
    chosen: list[Tensor] = []
    modules_after_attention(model)  # what is tried for it is not to be recorded
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, inputs, output: chosen.append(output[2]))
    in_one_batch(model, [short])
    alone, chosen[:] = [indices.clone() for indices in chosen], []
    in_one_batch(model, [long, short])
    for one, both in zip(alone, chosen, strict=True):  # in the last layer, where labels are
        start = len(both) // 2
        assert torch.equal(both[start : start + len(one)], one)
        assert len(one.unique()) > 2  # not the same two experts for every token


def test_caps_on_attention_scores_are_never_dropped() -> None:
    model, ids = tiny_models.build("gemma2"), torch.arange(3, 40)[None]
    assert model.config._attn_implementation == "eager"  # transformers' own choice
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        model.set_attn_implementation("sdpa")
    capped = model(input_ids=ids).logits
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert relative(model(input_ids=ids).logits, capped.double()) > 0.01


def short_and_long() -> tuple[Encoded, Encoded]:
    rng = np.random.default_rng(8)
    made = []
    for length in (9, 60):
        ids = rng.integers(3, tiny_models.VOCABULARY, size=length).astype(np.int32)
        made.append(Encoded(ids, np.arange(length) >= length - 4))
    return made[0], made[1]

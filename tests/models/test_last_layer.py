"""The last layer at labelled positions: what is trimmed in which family, and what never is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny_models
from gradsift.models.batches import Batch
from gradsift.models.last_layer import labelled_alone, modules_after_attention
from gradsift.models.losses import label_logits

AFTER_ATTENTION = {
    "llama": ("layers.1.self_attn.o_proj", "layers.1.mlp"),
    "gemma2": ("layers.1.self_attn.o_proj", "layers.1.mlp"),
    "gpt2": ("h.1.attn.c_proj", "h.1.mlp"),
    "gpt_neox": ("layers.1.attention.dense", "layers.1.mlp"),
    "qwen3_moe": ("layers.1.self_attn.o_proj", "layers.1.mlp"),
    "phi3": ("layers.1.mlp",),  # its attention's last matrix by name is the one before attention
}


@pytest.mark.parametrize("family", sorted(AFTER_ATTENTION))
def test_what_follows_the_last_attention_is_found(family: str) -> None:
    found = modules_after_attention(tiny_models.adapted(family))
    assert tuple(name.partition(".")[2] for name in found) == AFTER_ATTENTION[family]


class LooksBack(nn.Module):
    """An MLP that also reads the position before, as RWKV's does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden + 0.5 * hidden.roll(1, dims=1))


class TellsMore(LooksBack):
    """One that returns a second value."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden), 1  # type: ignore[return-value]


def test_what_reads_another_position_is_left_alone() -> None:
    model = tiny_models.build("llama")
    model.model.layers[-1].mlp = LooksBack(model.model.layers[-1].mlp)
    assert [*modules_after_attention(model)] == ["model.layers.1.self_attn.o_proj"]


def test_what_returns_more_than_a_tensor_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    last = model.model.layers[-1]
    last.mlp = TellsMore(last.mlp)
    norm = last.post_attention_layernorm
    monkeypatch.setattr(
        type(last),
        "forward",
        lambda self, hidden, **_: hidden + first(self.mlp(norm(hidden))),
    )

    def first(output: object) -> Tensor:
        return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]

    assert [*modules_after_attention(model)] == ["model.layers.1.self_attn.o_proj"]


def test_modules_run_at_labels_alone_and_are_left_as_they_were() -> None:
    model, tokens = tiny_models.adapted("llama"), []
    examples = tiny_models.examples(4, seed=3)
    batch = Batch.of(examples, torch.device("cpu"))
    modules = modules_after_attention(model)
    expected = label_logits(model, batch)
    handle = (
        model.get_base_model()
        .model.layers[-1]
        .mlp.down_proj.register_forward_hook(
            lambda _, inputs, output: tokens.append(inputs[0].shape[:-1].numel())
        )
    )
    with labelled_alone(modules, batch):
        torch.testing.assert_close(label_logits(model, batch), expected)
    label_logits(model, batch)
    handle.remove()
    assert tokens == [len(batch.labels), batch.input_ids.numel()]
    assert tokens[0] < tokens[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_taken_at_labels_goes_back_to_its_place() -> None:
    batch = Batch.of(tiny_models.examples(3, seed=1), torch.device("cpu"))
    hidden = torch.randn(*batch.input_ids.shape, 5, dtype=torch.float64, requires_grad=True)
    taken = batch.at_labels(hidden)
    assert torch.equal(taken[0], hidden[batch.rows, batch.columns])
    back = batch.spread(taken[0])
    at_labels = np.zeros(batch.input_ids.shape, dtype=bool)
    at_labels[batch.rows, batch.columns] = True
    assert torch.equal(back, hidden * torch.from_numpy(at_labels)[..., None])
    outer = torch.randn_like(back)
    (gradient,) = torch.autograd.grad(back, hidden, outer)
    assert torch.equal(gradient, outer * torch.from_numpy(at_labels)[..., None])

"""The last layer at labelled positions: what is trimmed in which family, and what never is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import reference
import tiny_models
from gradsift.config import LoraConfig
from gradsift.gradients.per_example import gradient_rows
from gradsift.models.batches import Batch
from gradsift.models.last_layer import labelled_alone, modules_after_attention
from gradsift.models.lora import attach_lora
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
    """An MLP that also reads a little of the position before, as RWKV's does."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden + self.share * hidden.roll(1, dims=1))


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smaller", [1, 0.1])
def test_what_reads_another_position_is_left_alone_and_so_is_what_it_reads(
    share: float, dtype: torch.dtype, smaller: float
) -> None:
    model = tiny_models.build("llama")
    for parameter in model.parameters():
        parameter.data *= smaller if parameter.dim() > 1 else 1
    model = model.to(dtype)
    model.model.layers[-1].mlp = LooksBack(model.model.layers[-1].mlp, share)
    assert not modules_after_attention(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_in_half_precision_the_same_is_found(family: str) -> None:
    whole, half = (tiny_models.build(family, dtype=t) for t in (torch.float32, torch.bfloat16))
    assert [*modules_after_attention(half)] == [*modules_after_attention(whole)] != []


class TellsMore(nn.Module):
    """An MLP that returns a second value."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> tuple[Tensor, int]:
        return self.inner(hidden), 1


class TakesFirst(nn.Module):
    """What makes a tensor of it again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.tells = TellsMore(inner)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.tells(hidden)[0]


def test_only_what_is_given_and_returns_one_tensor_of_all_tokens_is_taken() -> None:
    model = tiny_models.build("llama")
    last = model.model.layers[-1]
    last.mlp = TakesFirst(last.mlp)
    attention = "model.layers.1.self_attn.o_proj"
    assert [*modules_after_attention(model)] == [attention, "model.layers.1.mlp"]


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


@pytest.mark.parametrize("family", ["opt", "bloom", "mpt", "lfm2"])
def test_families_whose_last_layer_is_called_otherwise_are_measured_all_the_same(
    family: str,
) -> None:
    settings = {
        "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "hidden_size": 32},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        "lfm2": {
            "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2,
            "layer_types": ["full_attention", "conv"],
        },
    }[family]  # fmt: skip
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(
        family,
        vocab_size=tiny_models.VOCABULARY,
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, **settings},
    )
    base = tf.AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    model = attach_lora(base, LoraConfig(rank=2, target_modules="all-linear"), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model = model.requires_grad_(False).eval().double()  # some of them lose half their digits
    examples = tiny_models.examples(3, seed=2)
    rows = gradient_rows(model, examples, max_tokens=200)
    found = torch.cat([*rows.values()], dim=1).double()
    expected = reference.gradient_rows(model, examples)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4

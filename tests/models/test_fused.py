"""Fused norms and rotations: what is recognised, its numbers, and a model as found."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import tiny_models
from gradsift.models import fused
from gradsift.models.fused import NORM_LAWS, NormLaw, fused_elementwise

LLAMA, OLMO, GEMMA = NORM_LAWS
NORMS = {LlamaRMSNorm: LLAMA, Olmo2RMSNorm: OLMO, Gemma2RMSNorm: GEMMA}
FAMILIES = {  # how many norms of which law, and whether its rotation is known
    "llama": ({LLAMA: 5}, True),
    "qwen2": ({LLAMA: 5}, True),
    "mistral": ({LLAMA: 5}, True),
    "qwen3": ({LLAMA: 9}, True),
    "phi3": ({LLAMA: 5}, True),
    "olmo2": ({OLMO: 9}, True),
    "gemma2": ({GEMMA: 9}, True),
    "gemma3_text": ({GEMMA: 19}, True),
    "gpt_neox": ({}, True),
    "gpt2": ({}, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recognised_of_a_family(family: str) -> None:
    model = tiny_models.build(family)
    laws = Counter(law for module in model.modules() if (law := fused.norm_law(module)))
    rotation = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    assert (laws, fused.is_rotary(rotation)) == FAMILIES[family]


def norm_of(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    norm: Any = kind(48).requires_grad_(False)
    norm.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return norm.to(dtype)


def run(call: Callable[..., Any], *given: Tensor) -> list[Tensor]:
    """Return results, and gradients of what is given."""
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(2)
    outer = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in results]
    gradients = torch.autograd.grad(results, leaves, outer)
    return [*(result.detach() for result in results), *gradients]


def run_fused(model: nn.Module, call: Callable[..., Any], *given: Tensor) -> list[Tensor]:
    with fused_elementwise(model):
        return run(call, *given)


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((one.double() - other).abs().max() / other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def activations() -> Tensor:
    """Rows of usual size, and rows so small that epsilon counts."""
    x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(3))
    x[1] *= 1e-3
    return x


@pytest.mark.parametrize("kind", NORMS)
def test_norms_equal_float64(kind: type[nn.Module]) -> None:
    exact = norm_of(kind, torch.float64)
    expected = run(partial(plain_norm, exact, NORMS[kind]), activations().double())
    norm = norm_of(kind, torch.float32)
    assert error(run_fused(norm, norm, activations()), expected) < 1e-6


@pytest.mark.parametrize("kind", NORMS)
def test_norms_round_as_the_model_does(kind: type[nn.Module]) -> None:
    norm, x = norm_of(kind, torch.bfloat16), activations().bfloat16()
    plain, found = run(norm, x), run_fused(norm, norm, x)
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one != other).float().mean() < 0.01  # float32 inside, added up in another order
        assert error([one], [other.double()]) < 2**-7


@pytest.mark.parametrize("kind", NORMS)
def test_norms_off_the_cpu_follow_the_same_law(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_has_kernel", lambda x: True)
    test_norms_round_as_the_model_does(kind)


def test_rotations_equal_float64() -> None:
    model = tiny_models.build("llama")
    query, key = torch.randn(3, 4, 7, 8), torch.randn(3, 2, 7, 8)
    cos, sin = torch.randn(2, 3, 7, 8)  # its halves differ, as in no model

    def turn(*angles: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return lambda q, k: modeling_llama.apply_rotary_pos_emb(q, k, *angles)

    expected = run(turn(cos.double(), sin.double()), query.double(), key.double())
    assert error(run_fused(model, turn(cos, sin), query, key), expected) < 1e-6


def plain_norm(norm: nn.Module, law: NormLaw, x: Tensor) -> Tensor:
    """The norm in the precision of x; transformers' own would go to float32."""
    epsilon = fused._epsilon(norm)
    weight: Any = norm.weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (weight + law.shift)


def name_of(tensor: Tensor) -> str:
    return type(tensor.grad_fn).__name__


class _Doubled(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 2


class _Gated(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states * gate)


class _Shifted(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + self.weight[:3]  # which fails


def test_what_only_looks_alike_stays_as_it_is() -> None:
    ours = [kind(8) for kind in (_Doubled, _Gated, _Shifted)]
    theirs = [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.GroupNorm(2, 8), nn.Linear(8, 8)]
    model = nn.ModuleList([*ours, *theirs])
    with fused_elementwise(model):
        assert not any("forward" in vars(module) for module in model.modules())

    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * cos[:, None] + turned * sin[:, None]

        return turn(q), turn(k)

    assert not fused.is_rotary(interleaved)
    assert not fused.is_rotary(lambda q, k: (q, k))


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_of_another_precision_than_its_input_stays_plain(kind: type[nn.Module]) -> None:
    norm, x = norm_of(kind, torch.float32), activations().bfloat16()
    expected = norm(x)
    with fused_elementwise(norm):
        found = norm(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_a_model_is_left_as_found() -> None:
    model = tiny_models.build("llama")
    ids = torch.arange(3, 40)[None]
    before = model(input_ids=ids).logits
    norm = model.model.layers[0].input_layernorm
    norm.forward = own = norm.forward  # someone else's: it is neither used nor taken away
    with pytest.raises(ZeroDivisionError), fused_elementwise(model):
        assert "forward" in vars(model.model.norm)
        assert not torch.equal(model(input_ids=ids).logits, before)  # it rounds otherwise
        raise ZeroDivisionError
    replaced = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert replaced == {"model.layers.0.input_layernorm"}
    assert norm.forward is own
    assert torch.equal(model(input_ids=ids).logits, before)


def test_other_threads_keep_the_plain_rotation() -> None:
    model = tiny_models.build("llama")
    given = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(2)]
    given += [torch.randn(1, 5, 8) for _ in range(2)]

    def turn() -> str:
        return name_of(modeling_llama.apply_rotary_pos_emb(*given)[0])

    with fused_elementwise(model), ThreadPoolExecutor(1) as other:
        assert (turn(), other.submit(turn).result()) == ("_RotaryBackward", "AddBackward0")
    assert turn() == "AddBackward0"


def test_a_rotation_of_part_of_the_features_stays_plain() -> None:
    model = tiny_models.build("gpt_neox")
    rotate = modeling_gpt_neox.apply_rotary_pos_emb
    query, key, (cos, sin) = *torch.randn(2, 1, 2, 5, 8), torch.randn(2, 1, 5, 4)
    expected = rotate(query, key, cos, sin)
    with fused_elementwise(model):
        found = modeling_gpt_neox.apply_rotary_pos_emb(query, key, cos, sin)
    assert all(map(torch.equal, found, expected))

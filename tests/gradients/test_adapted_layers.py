"""Adapted layers, merged, plain or multiplying by themselves: gradients formed together."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import reference
import tiny_models
from gradsift.errors import ModelError
from gradsift.gradients import per_example
from gradsift.gradients.adapted_layers import AdaptedLayer, SharedInput
from gradsift.gradients.per_example import PerExampleGradients, gradient_rows
from gradsift.models.batches import Batch
from gradsift.models.lora import adapted_layers

EXAMPLES = tiny_models.examples(6, seed=4)


def rows(model: nn.Module) -> Tensor:
    """Whole rows, laid out as the reference's."""
    found = gradient_rows(model, EXAMPLES, max_tokens=200)
    return torch.cat([found[name] for name in found], dim=1).double()


def expected(model: peft.PeftModel) -> Tensor:
    return reference.gradient_rows(model.double(), EXAMPLES)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


class Other(nn.Linear):
    """A layer that is not read but called, as quantized ones are."""


class OtherConv1D(Conv1D):
    """The same of GPT-2's."""


def call_themselves(model: nn.Module, which: Callable[[str], bool] = lambda name: True) -> None:
    for name, layer in adapted_layers(model).items():
        if which(name):
            base = layer.get_base_layer()
            base.__class__ = OtherConv1D if isinstance(base, Conv1D) else Other


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_multiply_by_themselves_have_the_same_gradients(
    family: str, targets: str
) -> None:
    model = tiny_models.adapted(family, targets=targets)
    call_themselves(model)
    assert all(AdaptedLayer(n, m).weight is None for n, m in adapted_layers(model).items())
    found = rows(model)
    assert relative(found, expected(model)) < 1e-5


def test_of_layers_that_share_an_input_some_may_multiply_by_themselves() -> None:
    model = tiny_models.adapted("llama", targets="all-linear")
    call_themselves(model, lambda name: "k_proj" in name or "up_proj" in name)
    found = rows(model)
    assert relative(found, expected(model)) < 1e-5


def test_unmerged_layers_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.adapted("llama", targets="all-linear")

    class Unmerged(AdaptedLayer):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            self.weight, self.merged = self.base.weight, False

    merged = rows(model)
    monkeypatch.setattr(per_example, "AdaptedLayer", Unmerged)
    found = rows(model)
    assert not torch.equal(found, merged)  # another way to the same numbers
    wanted = expected(model)
    assert relative(found, wanted) < 1e-5
    assert relative(merged, wanted) < 1e-5


def test_unequal_ranks_and_scalings_share_an_input() -> None:
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj"],
        rank_pattern={"k_proj": 5},
        alpha_pattern={"v_proj": 1},
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_models.build("llama"), config)
    model = model.requires_grad_(False).eval()
    found = rows(model)
    assert relative(found, expected(model)) < 1e-5


@pytest.mark.parametrize(("targets", "inputs"), [("attention", 2), ("all-linear", 4)])
def test_layers_that_read_the_same_input_are_one_step(
    targets: str, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    class Seen(SharedInput):
        def backward(self, x: Tensor, wanted: bool) -> Tensor | None:
            made.append([layer.name.rpartition(".")[2] for layer in self.layers])
            return super().backward(x, wanted)

    monkeypatch.setattr(per_example, "SharedInput", Seen)
    model = tiny_models.adapted("llama", targets=targets)
    gradient_rows(model, EXAMPLES[:1], max_tokens=200)
    assert len(made) == 2 * inputs  # two layers
    assert made[-1] == ["q_proj", "k_proj", "v_proj"]


def test_an_output_that_is_not_used_has_no_gradient_and_takes_none_from_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.adapted("llama", targets="all-linear")
    mlp = model.get_base_model().model.layers[0].mlp

    def forward(x: Tensor) -> Tensor:
        mlp.up_proj(x)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))

    monkeypatch.setattr(mlp, "forward", forward)
    found = gradient_rows(model, EXAMPLES, max_tokens=200)
    unused = [name for name, block in found.items() if not bool(block.any())]
    assert unused == [f"model.layers.0.mlp.up_proj.{matrix}" for matrix in "AB"]
    for parameter in reference.lora_parameters(model.double()).values():
        parameter.requires_grad_(True)
    one = {
        name: torch.autograd.grad(reference.loss(model, EXAMPLES[0]), parameter, allow_unused=True)[
            0
        ]
        for name, parameter in reference.lora_parameters(model).items()
        if "layers.0" in name and "up_proj" not in name
    }
    for name, gradient in one.items():
        assert gradient is not None
        short = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        block = found[short.replace(".lora_", ".")][0].double()
        assert relative(block, gradient.flatten()) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_other_precisions_nothing_is_merged_and_gradients_are_the_same(family: str) -> None:
    model = tiny_models.adapted(family, targets="all-linear", dtype=torch.float64)
    assert not any(AdaptedLayer(n, m).merged for n, m in adapted_layers(model).items())
    found = rows(model)
    assert relative(found, expected(model)) < 1e-6  # kept in float32


@pytest.mark.parametrize("way", ["merged", "plain", "called"])
def test_what_a_layer_returns_may_be_changed_in_place(way: str) -> None:
    model = tiny_models.adapted("gpt2", dtype=torch.float64 if way == "plain" else torch.float32)
    if way == "called":
        call_themselves(model)
    for block in model.get_base_model().transformer.h:
        block.attn.c_attn.register_forward_hook(lambda _, inputs, output: output.clamp_(-1, 1))
    found = rows(model)
    assert relative(found, expected(model)) < 1e-5


def test_what_fails_in_a_batch_leaves_the_model_as_it_was() -> None:
    model = tiny_models.adapted("llama")
    before = {name: vars(module).copy() for name, module in model.named_modules()}

    def fail(name: str, gradient: Tensor) -> None:
        raise RuntimeError(name)

    batch = Batch.of(EXAMPLES, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="proj"), PerExampleGradients(model) as gradients:
        gradients(batch, fail)
    assert {name: vars(module) for name, module in model.named_modules()} == before


def test_what_fails_at_the_start_leaves_the_model_as_it_was() -> None:
    model = tiny_models.adapted("llama")
    last = [*adapted_layers(model).values()][-1]
    for matrix in (last.lora_A["default"], last.lora_B["default"]):
        matrix.weight.data = matrix.weight.data.double()
    with pytest.raises(ModelError, match=r"its adapter is torch.float64.*cast one of them"):
        PerExampleGradients(model).__enter__()
    assert not any("forward" in vars(module) for module in model.modules())


def test_two_passes_over_one_model_at_once_are_refused() -> None:
    model = tiny_models.adapted("llama")
    with PerExampleGradients(model), pytest.raises(ModelError, match="has been replaced already"):
        PerExampleGradients(model).__enter__()
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_adapter_that_is_not_at_work_as_it_is_is_refused() -> None:
    model = tiny_models.adapted("llama")
    model.merge_adapter()
    with pytest.raises(ModelError, match="alone, active and not merged"):
        PerExampleGradients(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ModelError, match="alone, active"):
        PerExampleGradients(model)
    PerExampleGradients(model)

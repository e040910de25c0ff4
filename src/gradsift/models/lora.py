"""LoRA layers of a model: attached afresh, found, and refused where a gradient would not be exact.

What gradsift cannot measure exactly (DoRA, LoRA on embeddings or experts, trained biases and
modules) is refused with the name of the layer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradsift.config import LoraConfig
from gradsift.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

_ADAPTER = "default"


class LoraPair(NamedTuple):
    """The two matrices of one adapted layer."""

    a: nn.Linear
    b: nn.Linear

    @classmethod
    def of(cls, layer: LoraLayer) -> LoraPair:
        """Return those of a layer that `adapted_layers` has found."""
        return cls(*(matrices[_ADAPTER] for matrices in (layer.lora_A, layer.lora_B)))  # type: ignore[arg-type]


def attach_lora(base: PreTrainedModel, config: LoraConfig, seed: int) -> peft.PeftModel:
    """Return the base model with a fresh, trainable adapter; same seed, same weights.

    Raises:
        ModelError: If there are no such layers, or one cannot be measured exactly.
    """
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=_target_modules(base, config.target_modules),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
    )
    # PEFT draws the matrices on the CPU: no GPU is opened for it, nor its generator changed
    with torch.device("cpu"), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        try:
            model = peft.get_peft_model(base, adapter)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"cannot adapt lora.target_modules={config.target_modules!r} of "
                f"{type(base).__name__}: {error}"
            ) from error
    assert isinstance(model, peft.PeftModel)
    lora_pairs(model)
    return model


def lora_pairs(model: nn.Module) -> dict[str, LoraPair]:
    """Return the A and B matrices of every adapted layer, by the layer's name in the base model.

    Raises:
        ModelError: As `adapted_layers`.
    """
    return {name: LoraPair.of(layer) for name, layer in adapted_layers(model).items()}


def scaling(layer: LoraLayer) -> float:
    """Return by what B A is multiplied."""
    return layer.scaling[_ADAPTER]


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return every adapted layer by its name in the base model.

    Raises:
        ModelError: Naming the first layer whose gradient cannot be measured exactly.
    """
    layers, head = {}, model.get_output_embeddings()  # type: ignore[operator]
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        short = name.removeprefix("base_model.model.")
        if layer is head:
            raise ModelError(f"cannot measure LoRA on the output head {short}; leave it out")
        if isinstance(layer, ParamWrapper):
            raise ModelError(
                f"cannot measure LoRA on the experts' parameters {short}; name attention layers"
            )
        a, b = (_matrix(matrices) for matrices in (layer.lora_A, layer.lora_B))
        if a is None or b is None:
            base = type(layer.get_base_layer()).__name__
            raise ModelError(f"cannot measure LoRA on {short} ({base}); adapt linear layers only")
        if _ADAPTER in layer.lora_variant:
            variant = type(layer.lora_variant[_ADAPTER]).__name__.removesuffix("Variant")
            raise ModelError(f"cannot measure {short}: its adapter is {variant}, not plain LoRA")
        if layer.merged or layer.disable_adapters or layer.active_adapters != [_ADAPTER]:
            raise ModelError(
                f"cannot measure {short}: expected its adapter {_ADAPTER!r} alone, active and not "
                "merged; unmerge it, enable it, or load the model anew"
            )
        if a.bias is not None or b.bias is not None:
            raise ModelError(f"cannot measure {short}: its LoRA matrices have biases (lora_bias)")
        layers[short] = layer
    if not layers:
        raise ModelError("the model has no LoRA layer")
    return layers


def _matrix(matrices: Mapping[str, nn.Module] | nn.ModuleDict) -> nn.Linear | None:
    matrix = dict(matrices.items()).get(_ADAPTER)
    return matrix if isinstance(matrix, nn.Linear) else None


def _target_modules(base: nn.Module, wanted: str | tuple[str, ...]) -> str | list[str]:
    """Return what PEFT is to adapt; `attention` is every projection inside an attention module."""
    if wanted == "all-linear":
        return "all-linear"
    if wanted != "attention":
        for module in wanted:
            if not any(f".{name}".endswith(f".{module}") for name, _ in base.named_modules()):
                raise ModelError(f"lora.target_modules names {module!r}, which the model lacks")
        return list(wanted)
    linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    attention = {name for name in linear if re.search(r"attn|attention", name)}
    if not attention:
        raise ModelError("found no attention projections; name them with lora.target_modules")
    leaves = {name.rpartition(".")[2] for name in attention}
    elsewhere = {name.rpartition(".")[2] for name in linear if name not in attention}
    return sorted(leaves if not leaves & elsewhere else attention)

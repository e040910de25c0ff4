"""How many parameters a model and an adapter have, counted without loading any weights."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gradsift.config import ModelConfig
from gradsift.models.files import config_of, translate_load_errors

_ADAPTER_WEIGHTS = "adapter_model.safetensors"  # as PEFT names them


def multiplied_parameters(config: ModelConfig) -> int:
    """Return how many parameters are multiplied with every token.

    All but the input embeddings, of which a token takes its row; they count where the output head
    is the same matrix. All experts of a mixture count, though a token meets but a few of them.

    Raises:
        ModelError: If its configuration is not there or describes no model.
    """
    described = config_of(config)
    with translate_load_errors(f"the model {config.name!r}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            described, trust_remote_code=config.trust_remote_code
        )
    lookup, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    total = sum(parameter.numel() for parameter in model.parameters())
    return total if head is not None and head.weight is lookup else total - lookup.numel()


def adapter_parameters(folder: Path) -> int:
    """Return how many parameters a stored adapter has."""
    with safe_open(folder / _ADAPTER_WEIGHTS, "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118

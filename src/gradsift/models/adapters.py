"""Stored LoRA adapters in PEFT's format: checked, loaded onto a base model, saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from gradsift.errors import ModelError
from gradsift.models.files import translate_load_errors
from gradsift.models.lora import lora_pairs
from gradsift.runs.atomic import room_for, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # those that leave the base as it is


def load_adapter(base: PreTrainedModel, path: Path) -> peft.PeftModel:
    """Return the base model with a stored LoRA adapter, frozen, in the base model's precision.

    Raises:
        ModelError: If the folder holds no LoRA adapter, one that cannot be measured exactly, or one
            whose layers are not those of this model.
    """
    config, name = _read_adapter_config(path), str(base.name_or_path)
    trained_on, config.base_model_name_or_path = config.base_model_name_or_path, name
    with translate_load_errors(f"the adapter {path}: it does not fit {name!r}"):
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    assert isinstance(model, peft.PeftModel)
    _check_fit(path, peft.get_peft_model_state_dict(model), name)
    if isinstance(trained_on, str) and Path(trained_on).name != Path(name).name:
        logger.warning(
            "the adapter %s says it was trained on %r and is used on %r; their shapes agree",
            path,
            trained_on,
            name,
        )
    with translate_load_errors(f"the adapter {path}"):
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(path), device="cpu"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # the adapter alone: rotary frequencies, for one, must stay float32
            parameter.data = parameter.data.to(base.dtype)
    lora_pairs(model)
    return model.requires_grad_(False).eval()


def _read_adapter_config(path: Path) -> peft.LoraConfig:
    if not (path / "adapter_config.json").is_file():
        raise ModelError(f"no adapter in {path}: expected a PEFT folder with adapter_config.json")
    with translate_load_errors(f"the adapter {path}"):
        config = peft.PeftConfig.from_pretrained(str(path))
    if not isinstance(config, peft.LoraConfig) or config.peft_type != peft.PeftType.LORA:
        raise ModelError(f"{path} is a {config.peft_type} adapter; gradsift measures LoRA only")
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise ModelError(
            f"the adapter {path} begins with init_lora_weights={config.init_lora_weights!r}, which "
            "changes the weights of the base model; convert it into a plain one where it was "
            "trained: save_pretrained(…, path_initial_model_for_weight_conversion=…) of PEFT (for "
            "LoftQ and EVA set init_lora_weights to true in its adapter_config.json and give the "
            "base model that it was trained on)"
        )
    extras = {
        "DoRA (use_dora)": config.use_dora,
        "fully trained modules (modules_to_save)": config.modules_to_save,
        "trained biases (bias)": config.bias != "none",
        "trained tokens (trainable_token_indices)": config.trainable_token_indices,
        "experts' parameters (target_parameters)": getattr(config, "target_parameters", None),
        "repeated layers (layer_replication)": config.layer_replication,
    }
    found = [name for name, value in extras.items() if value]
    if found:
        raise ModelError(
            f"the adapter {path} holds more than plain LoRA matrices: {', '.join(found)}; "
            "use a plain LoRA adapter, or leave --adapter out and let gradsift train one"
        )
    return config


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Keep an adapter in PEFT's format, the same bytes for the same adapter.

    Raises:
        RunError: If the disk is full.
    """
    with room_for(folder):
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # says nothing about this adapter
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, value in config.items():  # PEFT keeps names of modules as sets
            if isinstance(value, list) and all(isinstance(name, str) for name in value):
                config[key] = sorted(value)
        write_atomically(path, json.dumps(config, indent=2, sort_keys=True).encode())


def _check_fit(path: Path, expected: Mapping[str, torch.Tensor], model_name: str) -> None:
    weights = path / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise ModelError(f"{path} has no {weights.name} (pickled weights are not read)")
    try:
        with safe_open(weights, "pt") as file:
            found = {k: list(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"cannot read {weights}: {error}") from error
    wanted = {key: list(value.shape) for key, value in expected.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise ModelError(
                f"the adapter {path} belongs to another base model: {key} is "
                f"{found.get(key, 'missing')} there and {wanted.get(key, 'missing')} in "
                f"{model_name!r}"
            )

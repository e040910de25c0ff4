"""Base models, loaded through transformers and checked, on their device and in their precision."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gradsift.config import DataConfig, EngineConfig, ModelConfig
from gradsift.data.encoding import Encoder
from gradsift.errors import ModelError, shorten
from gradsift.models.devices import resolve_device, use_device
from gradsift.models.files import (
    check_model_files,
    config_of,
    known_sizes,
    load_tokenizer,
    translate_load_errors,
)
from gradsift.models.kernels import multiply_in_tf32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8
_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability of NVIDIA's Ampere; older cards emulate it


def resolve_dtype(config: ModelConfig) -> torch.dtype:
    """Return the precision asked for; `auto` is float32 on a CPU and what a GPU is quick in."""
    if config.dtype == "tf32":
        return torch.float32
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    device = resolve_device(config)
    if device.type == "cpu":
        return torch.float32
    recent = torch.cuda.get_device_capability(device) >= _FIRST_WITH_BFLOAT16
    return torch.bfloat16 if recent else torch.float16


def load_encoder(model: ModelConfig, data: DataConfig, engine: EngineConfig) -> Encoder:
    """Return the encoder for a model; examples are cut to what settings and model allow.

    Raises:
        ModelError: If there is no such device, configuration or tokenizer.
    """
    if engine.executor == "local":  # a cluster's devices are not this machine's
        resolve_device(model)  # before the work, not after it
    sizes, length = known_sizes(model), data.max_length
    if sizes.positions is not None and sizes.positions < length:
        length = sizes.positions
        logger.info("examples are cut to the model's %d positions", length)
    tokenizer = load_tokenizer(model)
    with translate_load_errors(f"the tokenizer of {model.name!r}"):
        return Encoder(tokenizer, length, data.template, sizes.embeddings)


def load_base(config: ModelConfig) -> PreTrainedModel:
    """Load the base model, frozen and in evaluation mode, on its device and in its precision.

    Raises:
        ModelError: If it cannot be loaded, lacks weights, has no output head, or lets a token see
            later ones.
    """
    device = use_device(config)
    clear_device_cache(garbage_collection=True)  # what a training left goes before more comes
    check_model_files(config)
    with translate_load_errors(f"the model {config.name!r}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.name,
            dtype=resolve_dtype(config),
            attn_implementation=None if config.attention == "auto" else config.attention,
            device_map={"": str(device)},
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **_quantized(config),
        )
        model, report = loaded
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(
            f"the model {config.name!r} lacks {len(names)} of its weights, which would be random "
            f"numbers: {shorten(', '.join(names))}; is it an adapter, or of another architecture "
            "than its config.json says?"
        )
    for module in model.modules():
        # on some CPUs bitsandbytes would repack weights into a form that has no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model = model.requires_grad_(False).eval()
    with translate_load_errors(f"the model {config.name!r}"):
        check_causal(model, config.name)
    if config.dtype == "tf32" and device.type == "cuda":
        multiply_in_tf32(model)
    return model


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Make sure that right padding without a mask changes nothing for the tokens before it.

    Raises:
        ModelError: If there is no output head, or what follows a token changes its logits.
    """
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name!r} ({type(model).__name__}) has no output embeddings")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, (1, 2 * _PROBE_TOKENS), generator=generator)
    ids = ids.repeat(2, 1)
    ids[1, _PROBE_TOKENS:] = 0
    alone = ids[:1, :_PROBE_TOKENS]
    with torch.no_grad():
        one, other, third = (
            logits[:_PROBE_TOKENS].float()
            for tokens in (ids, alone)
            for logits in model(input_ids=tokens.to(model.device), use_cache=False).logits
        )
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    tolerance = (1e-4 if exact else 0.05) * one.abs().max()
    if max((one - other).abs().max(), (one - third).abs().max()) > tolerance:
        raise ModelError(
            f"{name!r} ({type(model).__name__}) is not causal: what follows a token changes its "
            "logits, so that padding would change gradients; use a decoder-only language model"
        )


def _quantized(config: ModelConfig) -> dict[str, BitsAndBytesConfig]:
    """Return the argument that has transformers quantize the model, if it is to be."""
    # it would tell of casts for every layer of every pass
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if config.quantization == "none":
        return {}
    if getattr(config_of(config), "quantization_config", None) is not None:
        raise ModelError(f"{config.name!r} is already quantized; leave model.quantization out")
    if config.quantization == "8bit":
        # no columns set apart: they are chosen per batch, and gradients would depend on its mates
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=resolve_dtype(config),
        )
    return {"quantization_config": settings}

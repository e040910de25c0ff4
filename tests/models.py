"""Tiny random models and examples, built in code."""

from __future__ import annotations

import numpy as np
import peft
import torch
import transformers as tf
from transformers import PreTrainedModel

from gradsift.config import LoraConfig
from gradsift.data import Encoded
from gradsift.model import attach_lora

VOCABULARY = 97
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(family: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a tiny model of a family, its weights random but seeded."""
    torch.manual_seed(0)
    model: PreTrainedModel
    match family:
        case "llama":
            model = tf.LlamaForCausalLM(tf.LlamaConfig(**_SHAPE, tie_word_embeddings=tied))
        case "qwen2":
            model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SHAPE, tie_word_embeddings=tied))
        case "mistral":
            config = tf.MistralConfig(**_SHAPE, sliding_window=8, tie_word_embeddings=tied)
            model = tf.MistralForCausalLM(config)
        case "gpt2":
            config = tf.GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
            )  # fmt: skip
            model = tf.GPT2LMHeadModel(config)
        case _:
            raise AssertionError(family)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the default, so that nothing is linear
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).requires_grad_(False).eval()


def adapted(
    family: str, tied: bool = False, targets: str = "attention", dtype: torch.dtype = torch.float32
) -> peft.PeftModel:
    """Return such a model with a LoRA adapter whose both matrices are random."""
    config = LoraConfig(rank=3, alpha=6, dropout=0.1, target_modules=targets)  # type: ignore[arg-type]
    model = attach_lora(build(family, tied), config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).requires_grad_(False).eval()


def examples(count: int, seed: int = 0, longest: int = 40) -> list[Encoded]:
    """Return random token sequences with one or two supervised stretches each."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        length = int(rng.integers(6, longest))
        supervised = np.zeros(length, dtype=bool)
        for start in rng.integers(1, length, size=rng.integers(1, 3)):
            supervised[start : start + int(rng.integers(1, 8))] = True
        ids = rng.integers(3, VOCABULARY, size=length).astype(np.int32)
        result.append(Encoded(ids, supervised))
    return result

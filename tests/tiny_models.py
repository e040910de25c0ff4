"""Tiny random models and examples, built in code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import torch
import transformers as tf
from transformers import PreTrainedModel

from gradsift.config import LoraConfig
from gradsift.data.encoding import Encoded
from gradsift.models.lora import attach_lora

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


# What a family has of its own: small windows, caps that bite, layers of both kinds
_FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 8},
    "gpt2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
        "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"sliding_window": 8},
    "olmo2": {},
    "gpt_neox": {},
    "qwen3_moe": {
        "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    },
}  # fmt: skip


def build(family: str, tied: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a tiny model of a family (transformers' name of it), its weights random but seeded."""
    torch.manual_seed(0)
    settings = {**_SHAPE, **_FAMILIES[family], "tie_word_embeddings": tied}
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the default, so that nothing is linear
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).requires_grad_(False).eval()


def adapted(
    family: str,
    tied: bool = False,
    targets: str = "attention",
    dtype: torch.dtype = torch.float32,
    rank: int = 3,
) -> peft.PeftModel:
    """Return such a model with a LoRA adapter whose both matrices are random."""
    config = LoraConfig(rank=rank, alpha=2 * rank, dropout=0.1, target_modules=targets)  # type: ignore[arg-type]
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


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(template: str | None = CHATML) -> tf.PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as token_models

    inner = Tokenizer(token_models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    # as Llama 3 has it: white space is cut off the reported offsets
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["user assistant the what is answer of and one two"] * 9, trainer)
    result = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    result.chat_template = template
    return result


def save_base(path: Path, hidden_size: int = 32, max_position_embeddings: int = 128) -> Path:
    torch.manual_seed(0)
    shape = _SHAPE | {"vocab_size": 300, "hidden_size": hidden_size, "tie_word_embeddings": True}
    shape["max_position_embeddings"] = max_position_embeddings
    tf.LlamaForCausalLM(tf.LlamaConfig(**shape, initializer_range=0.1)).save_pretrained(str(path))
    tokenizer().save_pretrained(str(path))
    return path


def save_adapter(base: Path, path: Path, **changes: object) -> Path:
    """Save a random adapter, its configuration changed as asked for."""
    model = tf.AutoModelForCausalLM.from_pretrained(str(base))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | changes
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(str(path))
    return path

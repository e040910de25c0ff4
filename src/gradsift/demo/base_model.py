"""The small base model of the demonstration, trained on all skills until it half knows them."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.config import WarmupConfig
from gradsift.data.encoding import Encoded
from gradsift.demo import skills
from gradsift.demo.skills import SKILLS, make_examples
from gradsift.runs.remote import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BASE: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_BASE_TRAINING = WarmupConfig(epochs=4, learning_rate=3e-3, batch_size=64, micro_batch_tokens=4096)
_SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]


def cached_base(per_skill: int) -> Path:
    """Return the folder of the base model, trained on the first use and kept."""
    recipe = f"{_BASE} {_BASE_TRAINING} {_SPECIAL} {per_skill} {inspect.getsource(skills)}"
    name = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    cache = cache_folder()
    path = cache / f"demo-base-{name}"
    if path.exists():
        logger.info("base model: %s, trained before", path)
        return path
    logger.info(
        "first, and once: training a small base model until it half knows %d made-up skills, about "
        "a minute on 2 CPU cores (kept in %s)",
        len(SKILLS),
        path,
    )
    examples = [e for skill in SKILLS for e in make_examples(skill, per_skill, seed=0)]
    partial = cache / f"{path.name}.{os.getpid()}"
    tokenizer = _train_tokenizer(examples)
    tokenizer.save_pretrained(str(partial))
    _train_base(tokenizer, examples).save_pretrained(str(partial))
    if path.exists():  # another process was quicker
        shutil.rmtree(partial)
    else:
        partial.rename(path)
    return path


def _train_tokenizer(examples: Sequence[dict[str, Any]]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=_BASE["vocab_size"],
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (m["content"] for example in examples for m in example["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_SPECIAL[0], pad_token=_SPECIAL[1]
    )


def _train_base(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]]
) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradsift.data.encoding import Encoder
    from gradsift.models.training import steps_per_epoch, train

    torch.manual_seed(0)
    ends: dict[str, Any] = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**_BASE, **ends, tie_word_embeddings=True))
    encoded = Encoder(tokenizer, _BASE["max_position_embeddings"], "tulu").encode(
        [example["messages"] for example in examples]
    )
    usable = [example for example in encoded if isinstance(example, Encoded)]
    assert len(usable) == len(examples), "the demonstration makes usable examples only"
    steps = steps_per_epoch(len(usable), _BASE_TRAINING) * _BASE_TRAINING.epochs
    train(model, usable, _BASE_TRAINING, steps=steps, seed=0, label="base model")
    return model

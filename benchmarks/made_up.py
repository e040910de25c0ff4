"""A pool, four targets and a model laid out as those beside the project, where there are none.

The examples are the demonstration's skills, one to eight turns each; the model has random weights.
What it costs to measure them is real, what is found in them says nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gradsift.demo.base_model import _train_tokenizer
from gradsift.demo.skills import SKILLS, make_examples

NUM_TARGET = 64
MOST_TURNS = 8
SHAPE: dict[str, Any] = {
    "hidden_size": 224, "intermediate_size": 608, "num_hidden_layers": 6,
    "num_attention_heads": 7, "num_key_value_heads": 7, "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip


def make_shared(folder: Path, count: int, targets: tuple[str, ...]) -> Path:
    """Write model, pool of so many examples and targets; return the folder."""
    rng = np.random.default_rng(0)
    skills = list(SKILLS)
    pool = [_conversation(rng, str(rng.choice(skills)), i) for i in range(count)]
    _write(folder / "data" / "pool.jsonl", pool)
    for name, skill in zip(targets, skills, strict=False):
        made = [_conversation(rng, skill, count + i) for i in range(NUM_TARGET)]
        _write(folder / "data" / "targets" / name / "val.jsonl", made)
    tokenizer = _train_tokenizer([e for skill in skills for e in make_examples(skill, 50, seed=0)])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE))
    model.save_pretrained(str(folder / "models" / "base"))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(str(folder / "models" / "base"))
    return folder


def _conversation(rng: np.random.Generator, skill: str, seed: int) -> dict[str, Any]:
    made = make_examples(skill, int(rng.integers(1, MOST_TURNS + 1)), seed=seed)
    messages = [message for example in made for message in example["messages"]]
    return {"messages": messages, "source": skill}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

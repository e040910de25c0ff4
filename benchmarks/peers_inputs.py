"""What `peers.py` gives to every side: a base model, an adapter, a pool and queries, as files."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import pool_pass
from gradsift.config import DataConfig, EngineConfig, LoraConfig, ModelConfig
from gradsift.data.encoding import Encoded
from gradsift.models.loading import load_encoder
from gradsift.models.lora import attach_lora
from peers_job import Job, Row

MAX_LENGTH = 1024  # bergson takes no example that is longer than a batch
B_STD = 1e-3  # of the adapter's B, which is zero before any training


def make_base(shape: str, folder: Path) -> Path:
    """Return the folder of a base model, made under `folder` where it is not there yet."""
    models = pool_pass.SHARED / "models"
    if shape not in pool_pass.SHAPES and not models.exists():
        raise SystemExit(f"{shape} needs {models}, which is not there; take another --shape")
    if shape == "base":
        return models / "base"
    path = folder / shape
    if shape == "smollm2":
        subprocess.run([sys.executable, str(models / "smollm2.py"), str(path)], check=True)
    elif not (path / "config.json").exists():
        pool_pass.build_model(shape, 1, torch.device("cpu")).unload().save_pretrained(path)
    return path


def make_job(base: Path, rank: int, counts: tuple[int, int], folder: Path) -> Job:
    """Lay out all that one model, one rank and as many pool examples and queries need."""
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
    disable_progress_bar()
    job, (count, num_queries) = Job(folder), counts
    job.base.symlink_to(base.resolve(), target_is_directory=True)
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    save_random_adapter(model, rank, job.adapter)
    if (base / "tokenizer.json").exists():
        data = pool_pass.SHARED / "data"
        # the shortest target: no side's time is theirs
        target = data / "targets" / "emotion" / "val.jsonl"
        pool = encode(base, data / "pool.jsonl", count)
        queries = encode(base, target, num_queries)
    else:
        drawn = pool_pass.draw_examples(count + 4 * num_queries, model.config.vocab_size)
        pool, others = drawn[:count], drawn[count:]
        queries = sorted(others, key=lambda example: len(example.input_ids))[:num_queries]
    job.write_rows("pool", as_rows(pool))
    job.write_rows("queries", as_rows(queries))
    return job


def save_random_adapter(model: torch.nn.Module, rank: int, path: Path) -> None:
    """Save a LoRA adapter on q, k, v and o as PEFT does, B random so that A has a gradient too."""
    adapted = attach_lora(model, LoraConfig(rank=rank), seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=B_STD, generator=generator)
    adapted.save_pretrained(str(path))


def encode(base: Path, source: Path, count: int) -> list[Encoded]:
    """Return random rows of a file of conversations, encoded as gradsift encodes them."""
    data = DataConfig(pool=str(source), targets={"queries": str(source)}, max_length=MAX_LENGTH)  # type: ignore[arg-type]
    encoder = load_encoder(ModelConfig(name=str(base)), data, EngineConfig())
    lines = source.read_text("utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    outcomes = encoder.encode([json.loads(lines[i])["messages"] for i in order[: 2 * count]])
    found = [outcome for outcome in outcomes if isinstance(outcome, Encoded)][:count]
    if len(found) < count:
        raise SystemExit(f"{source} has {len(found)} usable rows of {count}; ask for fewer")
    return found


def as_rows(examples: Sequence[Encoded]) -> list[Row]:
    """Return the same tokens and the same mask as transformers and the peers want them."""
    return [
        {
            "input_ids": example.input_ids.tolist(),
            "labels": np.where(example.supervised, example.input_ids, -100).tolist(),
        }
        for example in examples
    ]

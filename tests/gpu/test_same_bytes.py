"""On CUDA with `engine.deterministic`: the same run twice leaves the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tiny_models
from conftest import Write
from gradsift.demo.skills import make_examples

pytestmark = pytest.mark.gpu

TOKENS = 1000  # of an example: flash attention adds up in no fixed order from some hundreds on


def long_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return examples of some hundred tokens each, all but a few of them supervised."""
    made = make_examples("record", 20 * count, seed=seed)
    texts = [example["messages"][1]["content"] for example in made]
    return [
        {"messages": [{"role": "user", "content": str(i)},
                      {"role": "assistant", "content": " ".join(texts[20 * i : 20 * i + 20])}]}
        for i in range(count)
    ]  # fmt: skip


def measure(base: Path, write: Write, folder: Path, device: torch.device, fixed: bool) -> Path:
    """Run `select` in a process of its own: what it sets stays in force until its end."""
    count = 64 if device.type == "cuda" else 8
    files = write("pool.jsonl", long_rows(count, 1)), write("t.jsonl", long_rows(4, 2))
    settings = [
        f"model.device={device}", "lora.rank=4", "warmup.learning_rate=0.01",
        "warmup.batch_size=4", "warmup.fraction=0.2",
        f"data.max_length={TOKENS}", "policy.decontaminate=none", "engine.batch_tokens=8000",
        f"engine.deterministic={str(fixed).lower()}",
    ]  # fmt: skip
    given = ["--model", base, "--pool", files[0], "--target", f"t={files[1]}", "--budget", "6"]
    given += ["--output-dir", folder, *(part for text in settings for part in ("--set", text))]
    command = [sys.executable, "-m", "gradsift", "select", *map(str, given)]
    # not what an earlier test of this process may have set
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of all that was trained, measured, scored and picked, by file."""
    patterns = [f"{part}/**/*.safetensors" for part in ("warmup", "targets", "coordinates")]
    patterns += ["scores/*.parquet", "selected/*.parquet", "selected/*.jsonl"]
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def coordinates(folder: Path) -> np.ndarray:
    shards = sorted((folder / "coordinates").rglob("*.safetensors"))
    found = [load_file(shard) for shard in shards]
    return np.concatenate([np.asarray(shard["coordinates"], np.float64) for shard in found])


def test_two_runs_leave_the_same_bytes(
    write: Write, tmp_path: Path, device: torch.device, figure: Callable[..., None]
) -> None:
    base = tiny_models.save_base(tmp_path / "base", max_position_embeddings=2 * TOKENS)
    one, other, free = (
        measure(base, write, tmp_path / name, device, fixed=name != "free")
        for name in ("one", "other", "free")
    )
    expected = digests(one)
    kinds = {name.partition("/")[0] for name in expected}
    assert kinds == {"warmup", "targets", "coordinates", "scores", "selected"}
    assert digests(other) == expected
    # without it they may differ; by how much is a figure, not a law
    found = [coordinates(folder) for folder in (one, free)]
    difference = float(np.abs(found[0] - found[1]).max() / np.abs(found[0]).max())
    figure(without_it_the_same_bytes=digests(free) == expected, difference=difference)

"""On CUDA: gradients and training on a base in 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reference
import tiny_models
from gradsift.config import LoraConfig, ModelConfig, WarmupConfig
from gradsift.gradients.per_example import blocks, gradient_rows
from gradsift.models.loading import load_base
from gradsift.models.lora import attach_lora
from gradsift.models.training import train

# in 8 bits a difference of rounding now and then moves one activation by a whole step
TOLERANCES = {"none": 1e-4, "4bit": 1e-4, "8bit": 5e-2}

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quantization", [*TOLERANCES])
def test_gradients_equal_the_plain_loop_and_training_learns(
    quantization: str, device: torch.device, tmp_path: Path, figure: Callable[..., None]
) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes", reason="the optional bitsandbytes is not installed")
    tiny_models.build("llama").save_pretrained(str(tmp_path / "base"))
    settings = ModelConfig(
        name=str(tmp_path / "base"), device=str(device), dtype="float32", quantization=quantization
    )  # type: ignore[arg-type]
    lora = LoraConfig(rank=3, alpha=6, dropout=0.0, target_modules="all-linear")
    model = attach_lora(load_base(settings), lora, seed=1)
    examples = tiny_models.examples(16, seed=3)

    warmup = WarmupConfig(batch_size=8, learning_rate=1e-2)
    log = train(model, examples, warmup, steps=8, seed=0)
    assert log[-1]["loss"] < log[0]["loss"]

    model = model.requires_grad_(False).eval()
    found = gradient_rows(model, examples, 100)
    rows = torch.cat([found[name] for name in blocks(model)], dim=1)
    expected = reference.gradient_rows(model, examples)
    assert rows.device == expected.device == device
    difference = float((rows - expected).abs().max() / expected.abs().max())
    cosine = float(torch.cosine_similarity(rows, expected).min())
    figure(difference=difference, cosine=cosine)
    assert difference < TOLERANCES[quantization]
    assert cosine > 0.999

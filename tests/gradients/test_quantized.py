"""Base models in 4 and 8 bits: the taps are on the adapter alone."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import reference
import tiny_models
from gradsift.config import LoraConfig, ModelConfig, WarmupConfig
from gradsift.errors import ModelError
from gradsift.gradients.per_example import PerExampleGradients, blocks
from gradsift.models.batches import Batch
from gradsift.models.forward import run_forward
from gradsift.models.loading import load_base
from gradsift.models.lora import attach_lora
from gradsift.models.training import train


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_models.build("llama").save_pretrained(str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="the optional bitsandbytes is not installed")


def settings(path: Path, quantization: str) -> ModelConfig:
    return ModelConfig(name=str(path), device="cpu", quantization=quantization)  # type: ignore[arg-type]


def adapted(path: Path, quantization: str, targets: str = "all-linear") -> peft.PeftModel:
    lora = LoraConfig(rank=3, alpha=6, target_modules=targets)  # type: ignore[arg-type]
    model = attach_lora(load_base(settings(path, quantization)), lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(("quantization", "tolerance"), [("4bit", 1e-4), ("8bit", 1e-2)])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_gradients_equal_the_plain_loop_on_the_same_model(
    saved: Path, quantization: str, tolerance: float, targets: str
) -> None:
    examples, found = tiny_models.examples(12, seed=3), {}
    model = adapted(saved, quantization, targets).requires_grad_(False).eval()
    run_forward(model, examples, 100)  # a pass without gradients must change nothing
    with PerExampleGradients(model) as gradients:
        batch = Batch.of(examples, torch.device("cpu"))
        gradients(batch, lambda name, g: found.update({name: g.flatten(1)}))
    rows = torch.cat([found[name] for name in blocks(model)], dim=1)
    expected = reference.gradient_rows(model, examples)
    # in 8 bits a difference of rounding now and then moves one activation by a whole step
    assert (rows - expected).abs().max() < tolerance * expected.abs().max()
    full = adapted(saved, "none", targets).requires_grad_(False).eval()
    assert not torch.equal(rows, reference.gradient_rows(full, examples))


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_warm_up_trains_on_a_quantized_base(saved: Path, quantization: str) -> None:
    warmup = WarmupConfig(epochs=4, batch_size=8, micro_batch_tokens=80, learning_rate=1e-2)
    log = train(adapted(saved, quantization), tiny_models.examples(16), warmup, steps=2, seed=0)
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
def test_a_model_stored_in_4_bits_loads_as_it_is(saved: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    load_base(settings(saved, "4bit")).save_pretrained(str(stored))
    assert load_base(settings(stored, "none")).is_loaded_in_4bit
    with pytest.raises(ModelError, match=r"is already quantized; leave model.quantization out"):
        load_base(settings(stored, "4bit"))


def test_without_bitsandbytes_the_error_names_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits in ("4bit", "8bit"):
        module = f"transformers.quantizers.quantizer_bnb_{bits}.is_bitsandbytes_available"
        monkeypatch.setattr(module, lambda *_: False)
        with pytest.raises(ModelError, match=r"requires bitsandbytes: `pip install"):
            load_base(settings(saved, bits))

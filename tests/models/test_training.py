"""The training step by length is the ordinary one, and whole passes are what they seem."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import reference
import tiny_models
from gradsift.config import LoraConfig, WarmupConfig
from gradsift.errors import NumericsError
from gradsift.models import training
from gradsift.models.batches import Batch
from gradsift.models.forward import run_forward
from gradsift.models.lora import attach_lora
from gradsift.models.losses import token_losses
from gradsift.models.training import steps_per_epoch, train


@pytest.mark.parametrize("micro_batch_tokens", [1, 90, 10_000])
def test_a_step_is_adamw_on_the_mean_over_all_tokens(micro_batch_tokens: int) -> None:
    examples = tiny_models.examples(16, seed=5)
    lora = LoraConfig(rank=3, alpha=6, dropout=0.0)
    settings = WarmupConfig(
        batch_size=16, micro_batch_tokens=micro_batch_tokens, learning_rate=1e-2, warmup_ratio=0.0
    )
    found = attach_lora(tiny_models.build("llama"), lora, seed=1)
    log = train(found, examples, settings, steps=2, seed=0)

    expected = attach_lora(tiny_models.build("llama"), lora, seed=1)
    parameters = [p for p in expected.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    counts = [int(e.supervised.sum()) for e in examples]
    for step, rate in enumerate((1e-2, 5e-3)):  # cosine decay over two steps
        optimizer.param_groups[0]["lr"] = rate
        total = sum(reference.loss(expected, e) * n for e, n in zip(examples, counts, strict=True))
        loss = total / sum(counts)
        assert log[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    for name, parameter in found.named_parameters():
        if parameter.requires_grad:
            other = dict(expected.named_parameters())[name]
            torch.testing.assert_close(parameter, other, rtol=2e-3, atol=2e-5)


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have a CPU scale losses as a GPU does in float16; so many first gradients are infinite."""
    plain_arguments, plain_losses, plain = training._arguments, token_losses, Accelerator.__init__

    def in_float16(*given: Any) -> Any:
        arguments = plain_arguments(*given)
        arguments.fp16 = True
        return arguments

    def scaled(accelerator: Accelerator, *given: Any, **named: Any) -> None:
        plain(accelerator, *given, **named)
        accelerator.scaler = torch.amp.GradScaler("cpu")

    def install(num_steps: int) -> None:
        steps = iter(range(num_steps))

        def losses(logits: Tensor, labels: Tensor) -> Tensor:
            found = plain_losses(logits, labels)
            if next(steps, None) is not None:
                found.register_hook(lambda gradient: gradient * math.inf)
            return found

        monkeypatch.setattr(training, "token_losses", losses)

    monkeypatch.setattr(training, "_arguments", in_float16)
    monkeypatch.setattr(Accelerator, "__init__", scaled)
    return install


def trained_in_float16(steps: int) -> torch.nn.Module:
    model = attach_lora(tiny_models.build("llama"), LoraConfig(rank=3), seed=1)
    settings = WarmupConfig(batch_size=4, learning_rate=1e-2, warmup_ratio=0.0)
    train(model, tiny_models.examples(4), settings, steps=steps, seed=0)
    return model


def test_the_scale_of_float16_begins_low_enough_for_a_short_training(
    overflow: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow(0)
    seen: list[float] = []

    def see(scaler: torch.amp.GradScaler, loss: Tensor) -> Tensor:
        found = plain(scaler, loss)
        seen.append(float(found.detach() / loss.detach()))
        return found

    plain = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", see)
    trained_in_float16(steps=2)
    assert seen == pytest.approx([1024.0, 1024.0])


def test_a_training_that_never_steps_is_an_error(overflow: Callable[[int], None]) -> None:
    overflow(3)
    message = "warm-up: 3 of 3 optimizer steps were skipped, .* use model.dtype=bfloat16 or float32"
    with pytest.raises(NumericsError, match=message):
        trained_in_float16(steps=3)


@pytest.mark.parametrize(("steps", "level"), [(3, "WARNING"), (20, "INFO"), (2, None)])
def test_skipped_steps_are_told_and_loudly_if_they_are_many(
    steps: int,
    level: str | None,
    overflow: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    num_skipped = 2 if level else 0
    overflow(num_skipped)
    model = trained_in_float16(steps)
    assert any(p.count_nonzero() for name, p in model.named_parameters() if "lora_B" in name)
    said = [(r.levelname, r.message) for r in caplog.records if "skipped" in r.message]
    assert [found for found, _ in said] == ([level] if level else [])
    assert all(f"2 of {steps} optimizer steps" in message for _, message in said)


def test_steps_of_an_epoch_round_up() -> None:
    settings = WarmupConfig(batch_size=8)
    assert [steps_per_epoch(n, settings) for n in (1, 8, 9)] == [1, 1, 2]


@pytest.mark.parametrize("max_tokens", [1, 90, 10_000])
def test_a_forward_pass_gives_what_the_plain_model_gives(max_tokens: int) -> None:
    model, examples = tiny_models.adapted("llama"), tiny_models.examples(11, seed=2)
    found = run_forward(model, examples, max_tokens)
    with torch.no_grad():
        for row, example in enumerate(examples):
            loss = reference.loss(model, example)
            assert found.losses[row].item() == pytest.approx(loss.item(), rel=1e-4)
            ids = torch.from_numpy(example.input_ids).long()[None]
            out = model(input_ids=ids, output_hidden_states=True)
            right = (out.logits[0].argmax(-1)[:-1] == ids[0, 1:])[
                torch.from_numpy(example.supervised[1:])
            ]
            assert found.num_correct[row] == right.sum()
            weights = torch.arange(1.0, len(ids[0]) + 1)
            mean = (weights[:, None] * out.hidden_states[-1][0]).sum(0)
            torch.testing.assert_close(found.hidden[row], mean / mean.norm(), rtol=1e-3, atol=1e-4)


def test_a_whole_batch_holds_what_follows_the_last_label_too() -> None:
    examples = tiny_models.examples(4, seed=1)
    batch = Batch.of(examples, torch.device("cpu"), whole=True)
    assert batch.input_ids.shape[1] == max(len(e.input_ids) for e in examples)
    for row, example in enumerate(examples):
        ids = batch.input_ids[row, : len(example.input_ids)].numpy()
        np.testing.assert_array_equal(ids, example.input_ids)

"""On CUDA: memory really runs out, work is halved, and what is found stays the same."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import tiny_models
from gradsift.config import LoraConfig, WarmupConfig
from gradsift.gradients.basis import Basis
from gradsift.gradients.per_example import blocks
from gradsift.gradients.projection import project
from gradsift.models import batches
from gradsift.models.batch_size import probe, within_memory
from gradsift.models.batches import lengths_of
from gradsift.models.lora import attach_lora
from gradsift.models.training import train

pytestmark = pytest.mark.gpu

FREE = 300 * 2**20
MANY_TOKENS = 2**20  # their activations alone take gigabytes


@contextmanager
def no_more_than(free: int, device: torch.device) -> Iterator[None]:
    """Let this process take so many bytes on top of what it has, on the device or the CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_reserved(device) + free) / total
        torch.cuda.set_per_process_memory_fraction(share, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def prepared(device: torch.device) -> tuple[peft.PeftModel, Basis]:
    model = tiny_models.adapted("llama").to(device)
    generator = torch.Generator().manual_seed(0)
    basis = {
        name: torch.randn(4, prod(shape), generator=generator).to(device)
        for name, shape in blocks(model).items()
    }
    return model, Basis(basis, frozenset(), device)


def test_a_pool_pass_is_halved_and_finds_the_same(
    device: torch.device,
    figure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(batches, "MAX_EXAMPLES", 10**6)
    model, basis = prepared(device)
    examples = tiny_models.examples(400)
    alone = project(model, examples, 400, basis)
    many = examples * 100
    with no_more_than(FREE, device):
        found, tokens = within_memory(
            lambda tokens: project(model, many, tokens, basis), MANY_TOKENS, lengths_of(many)
        )
        # what comes after has its memory again: no tensor of the pass that failed is left
        project(model, examples, 400, basis)
    figure(tokens=tokens)
    assert 400 < tokens < MANY_TOKENS
    assert f"out of memory; going on with batches of {tokens} tokens" in caplog.text
    for name in ("coordinates", "losses", "gradient_norms"):
        one, other = (getattr(whole, name)[:400] for whole in (alone, found))
        assert (one - other).abs().max() < 1e-4 * one.abs().max()


def test_the_probe_finds_what_then_fits(
    device: torch.device, figure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (batches, sys.modules[probe.__module__]):
        monkeypatch.setattr(module, "MAX_EXAMPLES", 10**6)
    model, basis = prepared(device)
    many = tiny_models.examples(400) * 100
    project(model, many[:400], 400, basis)
    with no_more_than(FREE, device):
        tokens = probe(
            lambda examples, tokens: project(model, examples, tokens, basis),
            lengths_of(many),
            MANY_TOKENS,
        )
        _, used = within_memory(
            lambda tokens: project(model, many, tokens, basis), tokens, lengths_of(many)
        )
    figure(tokens=tokens, used=used)
    assert tokens < MANY_TOKENS
    assert used >= tokens // 2  # memory that is in pieces may cost one halving more


def test_a_training_is_halved_and_learns_the_same(
    device: torch.device, figure: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    examples = tiny_models.examples(400) * 40
    settings = WarmupConfig(
        batch_size=len(examples), micro_batch_tokens=MANY_TOKENS, learning_rate=1e-2, warmup_ratio=0
    )
    lora = LoraConfig(rank=3, alpha=6, dropout=0.0)
    logs, weights = [], []
    for limited in (True, False):
        model = attach_lora(tiny_models.build("llama").to(device), lora, seed=1)
        own = settings if limited else settings.model_copy(update={"micro_batch_tokens": 8000})
        train(model, examples[:400], own, steps=1, seed=0)  # what is set up once
        model = attach_lora(tiny_models.build("llama").to(device), lora, seed=1)
        if limited:
            with no_more_than(FREE, device):
                logs.append(train(model, examples, own, steps=2, seed=0))
            assert "out of memory" in caplog.text
            caplog.clear()
        else:
            logs.append(train(model, examples, own, steps=2, seed=0))
            assert "out of memory" not in caplog.text
        trained = [p.detach().float().cpu() for p in model.parameters() if p.requires_grad]
        weights.append(torch.cat([p.flatten() for p in trained]))
    losses = [np.array([entry["loss"] for entry in log]) for log in logs]
    figure(loss_difference=float(np.abs(losses[0] - losses[1]).max()))
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][1] < losses[0][0]
    # Adam turns a gradient near zero into a whole step, of either sign
    assert torch.quantile((weights[0] - weights[1]).abs(), 0.99) < 1e-4

"""A training that runs out of memory goes on with less, as if it had begun with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils, modeling_flash_attention_utils

import tiny_models
from gradsift.config import LoraConfig, WarmupConfig
from gradsift.data.encoding import Encoded
from gradsift.errors import ModelError
from gradsift.gradients.per_example import PerExampleGradients
from gradsift.models import micro_batches, training
from gradsift.models.batches import Batch, lengths_of, plan_batches
from gradsift.models.lora import attach_lora
from gradsift.models.losses import label_logits, nothing_packed
from gradsift.models.micro_batches import MicroBatches, first_tokens
from gradsift.models.training import train

Fails = Callable[[nn.Module, int], bool]


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "_FITTED", {})
    # what Python collects takes long
    monkeypatch.setattr("gradsift.models.batch_size.clear_device_cache", lambda **_: None)


def trained(
    family: str = "llama", steps: int = 1, **settings: object
) -> tuple[dict[str, Tensor], object]:
    """Return the adapter after training with dropout, and the log; the model can be measured."""
    model = attach_lora(tiny_models.build(family), LoraConfig(rank=3, alpha=6, dropout=0.3), seed=1)
    given = WarmupConfig(batch_size=8, learning_rate=1e-2, warmup_ratio=0.0, **settings)  # type: ignore[arg-type]
    log = train(model, tiny_models.examples(8, seed=5), given, steps=steps, seed=0)
    PerExampleGradients(model.requires_grad_(False).eval())
    return {n: p for n, p in model.named_parameters() if "lora_" in n}, log


def assert_same_bits(one: tuple[dict[str, Tensor], object], other: object) -> None:
    values, log = other  # type: ignore[misc]
    assert one[1] == log
    assert all(torch.equal(value, values[name]) for name, value in one[0].items())


def is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fails], list[int]]:
    """Have micro-batches run out of memory after their forward pass; return the sizes of all."""

    def install(fails: Fails) -> list[int]:
        sizes: list[int] = []

        def stand_in(model: nn.Module, batch: Batch) -> Tensor:
            logits = label_logits(model, batch)
            sizes.append(batch.input_ids.numel())
            if fails(model, sizes[-1]):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return logits

        monkeypatch.setattr(training, "label_logits", stand_in)
        return sizes

    return install


def test_a_step_that_does_not_fit_is_done_again_with_half_the_tokens(
    out_of_memory: Callable[[Fails], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(steps=2, micro_batch_tokens=50)
    tried: list[int] = []

    def second_one(_: nn.Module, size: int) -> bool:  # the gradients of the first are there
        tried.append(size)
        return len(tried) == 2

    out_of_memory(second_one)
    assert_same_bits(trained(steps=2, micro_batch_tokens=100), expected)
    assert max(tried[2:]) <= 50 < tried[0]
    assert "out of memory; going on with batches of 50 tokens" in caplog.text


def test_the_last_resort_is_checkpointing(
    out_of_memory: Callable[[Fails], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(micro_batch_tokens=10, gradient_checkpointing=True)
    out_of_memory(lambda model, _: not is_checkpointed(model))
    assert_same_bits(trained(micro_batch_tokens=10), expected)
    assert "out of memory with one example; going on with gradient checkpointing" in caplog.text


@pytest.mark.parametrize("checkpointing", ["auto", False])
def test_what_never_fits_is_an_error_and_leaves_the_model_as_it_was(
    checkpointing: object, out_of_memory: Callable[[Fails], list[int]]
) -> None:
    tried = out_of_memory(lambda model, _: True)
    model = attach_lora(tiny_models.build("llama"), LoraConfig(rank=3), seed=1)
    settings = WarmupConfig(micro_batch_tokens=20, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
    advice = "lower data.max_length or lora.rank, or quantize the model"
    if checkpointing is False:
        advice = f"set gradient_checkpointing to auto, {advice}"
    with pytest.raises(ModelError, match=f"the longest of .* tokens; {advice} .CUDA"):
        train(model, tiny_models.examples(1), settings, steps=1, seed=0)
    assert len(tried) == (2 if checkpointing == "auto" else 1)
    PerExampleGradients(model.requires_grad_(False).eval())  # which refuses checkpointing


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_computes_every_layer_twice_and_changes_no_bit(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    projected = []

    def count(model: nn.Module, batch: Batch) -> Tensor:
        [first, *_] = (module for name, module in model.named_modules() if "lora_A.d" in name)
        first.register_forward_hook(lambda *_: projected.append(1))
        monkeypatch.setattr(training, "label_logits", label_logits)
        return label_logits(model, batch)

    runs = []
    for checkpointing in (False, True):
        monkeypatch.setattr(training, "label_logits", count)
        runs.append(trained(family, steps=2, gradient_checkpointing=checkpointing))
    assert_same_bits(*runs)
    assert len(projected) == 2 * (1 + 2)  # one micro-batch in each of two steps


def rows_are_shared() -> list[bool]:
    """Return what transformers finds in a row where two sequences are, by both of its lookups."""
    row = torch.tensor([[0, 1, 2, 0, 1]])
    found = masking_utils.find_packed_sequence_indices(row)
    return [found is not None, bool(modeling_flash_attention_utils._is_packed_sequence(row, 1))]


def test_transformers_looks_for_shared_rows_in_neither_pass_of_a_training_but_elsewhere() -> None:
    model = attach_lora(tiny_models.build("llama"), LoraConfig(rank=3), seed=1)
    inside, elsewhere = [], []

    def look(*_: object) -> None:
        inside.append(rows_are_shared())
        other = threading.Thread(target=lambda: elsewhere.append(rows_are_shared()))
        other.start()
        other.join()

    [first, *_] = (module for name, module in model.named_modules() if "lora_A.d" in name)
    first.register_forward_hook(look)
    settings = WarmupConfig(batch_size=8, gradient_checkpointing=True)
    train(model, tiny_models.examples(8), settings, steps=1, seed=0)
    assert inside == [[False, False]] * 2  # forward, and again on the way back
    assert elsewhere == [[True, True]] * 2
    assert rows_are_shared() == [True, True]


def test_passes_that_overlap_in_threads_leave_no_trace() -> None:
    entered, left = threading.Event(), threading.Event()

    def hold() -> None:
        with nothing_packed():
            entered.set()
            left.wait()

    other = threading.Thread(target=hold)
    other.start()
    entered.wait()
    with nothing_packed():
        with nothing_packed():
            pass
        assert rows_are_shared() == [False, False]
        left.set()
        other.join()
        assert rows_are_shared() == [False, False]
    assert rows_are_shared() == [True, True]


def test_a_model_without_layers_for_checkpointing_is_told() -> None:
    with (
        pytest.raises(ModelError, match="Linear has no layers for gradient checkpointing; set"),
        MicroBatches(nn.Linear(1, 1), 10, True),
    ):
        pass
    with MicroBatches(nn.Linear(1, 1), 10, "auto") as fits:
        assert fits.fit(lambda tokens: tokens, np.array([20])) == 10


def test_what_fits_is_found_before_the_first_step_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
    out_of_memory: Callable[[Fails], list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    longest = int(lengths_of(tiny_models.examples(8, seed=5)).max())
    found = 11 * longest // 2
    expected = trained(micro_batch_tokens=found)
    monkeypatch.setattr(micro_batches, "_can_be_tried", lambda device: True)
    sizes = out_of_memory(lambda _, size: size > 5 * longest)
    assert_same_bits(trained(), expected)
    # the worst of a step of 8, halved, bisected, and the step
    assert sizes[:6] == [count * longest for count in (8, 4, 6, 5, 5, 6)]
    in_a_step = len(plan_batches(lengths_of(tiny_models.examples(8, seed=5)), found))
    assert len(sizes) == 6 + in_a_step
    assert [r.levelname for r in caplog.records if "going on with batches" in r.message] == ["INFO"]
    assert f"batches of up to {found} tokens, gradient checkpointing off" in caplog.text
    sizes.clear()
    assert_same_bits(trained(), expected)  # remembered
    assert len(sizes) == in_a_step
    caplog.clear()
    out_of_memory(lambda model, _: not is_checkpointed(model))
    for _ in range(2):
        trained(micro_batch_tokens=longest)
        assert f"batches of up to {longest} tokens, gradient checkpointing on" in caplog.text
        caplog.clear()


def test_what_was_remembered_and_fits_no_more_is_halved_and_so_remembered(
    monkeypatch: pytest.MonkeyPatch, out_of_memory: Callable[[Fails], list[int]]
) -> None:
    monkeypatch.setattr(micro_batches, "_can_be_tried", lambda device: True)
    longest = int(lengths_of(tiny_models.examples(8, seed=5)).max())
    trained()
    sizes = out_of_memory(lambda _, size: size > 3 * longest)
    expected = trained(micro_batch_tokens=2 * longest)
    sizes.clear()
    assert_same_bits(trained(), expected)
    assert max(sizes) > 3 * longest
    sizes.clear()
    assert_same_bits(trained(), expected)
    assert max(sizes) <= 2 * longest


def test_checkpointing_that_long_examples_needed_is_left_off_for_shorter_ones() -> None:
    model, tried, found = tiny_models.adapted("llama"), [], []

    def run(examples: list[Encoded], _: int) -> None:
        tried.append(len(examples[0].input_ids) - 1)
        if tried[-1] > 10 and not is_checkpointed(model):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for longest in (20, 20, 5, 4):
        with MicroBatches(model, "auto", "auto") as fits:
            fits.try_worst(run, longest, num_examples=1)
            found.append(is_checkpointed(model))
    assert (tried, found) == ([20, 20, 5], [True, True, False, False])


def test_a_size_that_is_set_and_just_fits_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    out_of_memory: Callable[[Fails], list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(micro_batches, "_can_be_tried", lambda device: True)
    longest = int(lengths_of(tiny_models.examples(8, seed=5)).max())
    given = 5 * longest - 1
    sizes = out_of_memory(lambda _, size: size > given)
    trained(micro_batch_tokens=given)
    assert sizes[0] == 4 * longest
    assert f"batches of up to {given} tokens" in caplog.text


def test_what_is_set_is_taken_and_auto_goes_by_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert (first_tokens(77, gpu), first_tokens("auto", cpu)) == (77, 1024)
    assert first_tokens("auto", gpu) == 16_384


def test_one_of_several_processes_ends_with_what_to_change() -> None:
    def step(max_tokens: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    fits = MicroBatches(tiny_models.build("llama"), 100, "auto", num_processes=2)
    message = r"one of 2 processes .*set warmup.micro_batch_tokens .* to 50 or fewer.*2.00 GiB"
    with pytest.raises(ModelError, match=message):
        fits.fit(step, np.array([20]))

    def broken(max_tokens: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        fits.fit(broken, np.array([20]))


_TOGETHER = """
import logging, os, sys
sys.path.insert(0, {tests!r})
import torch, tiny_models
from gradsift.config import LoraConfig, WarmupConfig
from gradsift.models import micro_batches, training
from gradsift.models.losses import label_logits
from gradsift.models.lora import attach_lora
torch.distributed.init_process_group("gloo")
logging.basicConfig(level="INFO", format="%(message)s")
rank, calls = torch.distributed.get_rank(), []
def stand_in(model, batch):
    logits = label_logits(model, batch)
    calls.append(batch.input_ids.numel())
    on = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    later = batch.input_ids.any() and len(calls) > {most}
    if rank == 1 and (calls[-1] > 150 or not on or later):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return logits
training.label_logits = stand_in
micro_batches._can_be_tried = lambda device: True
model = attach_lora(tiny_models.build("llama"), LoraConfig(rank=3, alpha=6, dropout=0.0), seed=1)
settings = WarmupConfig(batch_size=16, learning_rate=1e-2, warmup_ratio=0.0)
log = training.train(model, tiny_models.examples(16, seed=5), settings, steps=3, seed=0)
print(f"rank {{rank}}: losses {{[round(entry['loss'], 4) for entry in log]}}", flush=True)
torch.distributed.destroy_process_group()
"""


def together(path: Path, most: int) -> subprocess.CompletedProcess[str]:
    """Train in two processes; one has less memory and runs out in a step after so many batches."""
    path.write_text(_TOGETHER.format(tests=str(Path(__file__).parents[1]), most=most))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=240, env=environment
    )


@pytest.mark.slow
def test_processes_that_train_together_agree_on_what_fits(tmp_path: Path) -> None:
    done = together(tmp_path / "train.py", most=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.findall("training in batches of up to .*", done.stderr)
    assert len(said) == 2
    assert len(set(said)) == 1
    tokens, longest = int(said[0].split()[6]), lengths_of(tiny_models.examples(16, seed=5)).max()
    assert tokens // longest * longest <= 150  # of whole examples
    assert said[0].endswith("gradient checkpointing on")
    model = attach_lora(
        tiny_models.build("llama"), LoraConfig(rank=3, alpha=6, dropout=0.0), seed=1
    )
    settings = WarmupConfig(batch_size=16, learning_rate=1e-2, warmup_ratio=0.0)
    log = train(model, tiny_models.examples(16, seed=5), settings, steps=3, seed=0)
    losses = re.search(r"rank 0: losses \[(.*?)\]", done.stdout)
    assert losses
    for found, entry in zip(losses[1].split(", "), log, strict=True):
        assert float(found) == pytest.approx(entry["loss"], abs=2e-4)


@pytest.mark.slow
def test_processes_that_train_together_end_when_memory_runs_out_later(tmp_path: Path) -> None:
    done = together(tmp_path / "train.py", most=0)
    assert done.returncode != 0
    assert "out of memory in one of 2 processes that train together" in done.stderr
    assert "training in batches of up to" in done.stderr

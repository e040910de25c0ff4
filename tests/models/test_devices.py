"""Which device is chosen, and that trainings stay on it: GPUs are made up, none is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

import tiny_models
from gradsift.config import LoraConfig, ModelConfig, WarmupConfig
from gradsift.errors import ModelError
from gradsift.models.devices import resolve_device, use_device
from gradsift.models.loading import load_base
from gradsift.models.lora import attach_lora
from gradsift.models.training import train

SETTINGS = WarmupConfig(batch_size=2, learning_rate=1e-2)
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
See = Callable[..., list[torch.device]]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Iterator[See]:
    """Have PyTorch see GPUs, in a process of a launch; returned are those that are made current."""

    def see(num_gpus: int, rank: int | None = None, processes: int | None = None) -> Any:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda d: current.append(torch.device(d)))
        for name, value in zip(LAUNCH, (rank, rank, processes, processes), strict=True):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))
        return current

    yield see
    AcceleratorState._reset_state(reset_partial_state=True)  # it is the process's


@pytest.mark.parametrize(
    ("asked", "num_gpus", "rank", "processes", "expected"),
    [
        ("auto", 0, None, None, "cpu"),
        ("cpu", 2, None, None, "cpu"),
        ("auto", 2, None, None, "cuda:0"),
        ("cuda", 2, None, None, "cuda:0"),
        ("cuda:1", 2, None, None, "cuda:1"),
        ("cuda:1", 2, 0, 1, "cuda:1"),  # torchrun with one process
        ("cuda", 4, 3, 4, "cuda:3"),
        ("auto", 4, 3, 4, "cuda:3"),
        ("cuda", 4, 1, 2, "cuda:1"),
        ("auto", 1, 3, 4, "cuda:0"),  # each sees its own alone
        ("cuda:0", 1, 3, 4, "cuda:0"),
        ("cuda", 4, 3, None, "cuda:3"),  # a launcher that does not say how many there are
        ("cpu", 2, 3, 4, "cpu"),
        ("auto", 0, 3, 4, "cpu"),
    ],
)
def test_each_process_has_the_device_asked_for(
    see: See, asked: str, num_gpus: int, rank: int, processes: int, expected: str
) -> None:
    current, config = see(num_gpus, rank, processes), ModelConfig(name="x", device=asked)
    assert resolve_device(config) == torch.device(expected)
    assert not current, "only who works on a GPU opens it"
    assert use_device(config) == torch.device(expected)
    assert current == ([torch.device(expected)] if expected != "cpu" else [])


@pytest.mark.parametrize(
    ("asked", "num_gpus", "rank", "processes", "told"),
    [
        ("tpu", 2, None, None, "'tpu': expected auto, cpu, cuda or, by number, cuda:0"),
        ("cuda:x", 2, None, None, "'cuda:x': expected auto"),
        ("cuda", 0, None, None, r"'cuda': GPUs that PyTorch \d.* finds here: 0; see nvidia"),
        ("cuda:2", 2, None, None, "'cuda:2': GPUs .* finds here: 2;"),
        ("cuda:1", 1, 1, 2, "'cuda:1': GPUs .* finds here: 1;"),
        ("cuda:1", 2, 0, 2, "'cuda:1' in 2 processes .*: all would share one GPU"),
        ("cuda", 2, 0, 4, r"4 processes .* cannot share 2 GPUs: .*--nproc-per-node 2"),
        ("auto", 2, 3, 4, r"4 processes .* cannot share 2 GPUs: .*--num_processes 2"),
        ("auto", 2, 3, None, "4 processes on this machine cannot share 2 GPUs"),
    ],
)
def test_a_device_that_is_not_there_or_would_be_shared_is_refused(
    see: See, asked: str, num_gpus: int, rank: int, processes: int, told: str
) -> None:
    see(num_gpus, rank, processes)
    with pytest.raises(ModelError, match=told):
        resolve_device(ModelConfig(name="x", device=asked))


def test_a_gpu_that_cannot_be_opened_is_told(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: object) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore of it")

    see(2)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(ModelError, match=r"cannot use the device 'cuda:1': .* are busy$"):
        use_device(ModelConfig(name="x", device="cuda:1"))


def test_a_model_is_loaded_on_the_current_device(
    see: See, monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    current, loaded = see(2), []

    def from_pretrained(name: str, device_map: dict[str, str], **_: Any) -> None:
        loaded.append((current[-1], device_map))
        raise RuntimeError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="enough"):
        load_base(ModelConfig(name=str(base), device="cuda:1", dtype="float32"))
    assert loaded == [(torch.device("cuda:1"), {"": "cuda:1"})]


@pytest.fixture
def model() -> nn.Module:
    """A model to train, made before any GPU is seen."""
    return attach_lora(tiny_models.build("llama"), LoraConfig(rank=2), seed=1)


def _training(
    model: nn.Module, device: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Trainer, set[torch.device], list[Any]]:
    """Return the Trainer of a training on a made-up GPU, where models went, how DDP was called."""
    begun: list[Trainer] = []
    moved: set[torch.device] = set()
    wrapped: list[Any] = []

    def to(model: nn.Module, device: Any) -> nn.Module:
        moved.add(torch.device(device))
        return model

    class Parallel(nn.Module):
        def __new__(cls, model: nn.Module, device_ids: Any, **_: Any) -> Any:
            wrapped.append(device_ids)
            return model

    def begin(trainer: Trainer) -> None:
        begun.append(trainer)
        trainer.accelerator.prepare(trainer.model)  # as its first step would

    monkeypatch.setattr("gradsift.models.training.device_of", lambda model: torch.device(device))
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Parallel)
    monkeypatch.setattr(Trainer, "train", begin)
    train(model, tiny_models.examples(4), SETTINGS, steps=1, seed=0)
    return begun[0], moved, wrapped


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_training_stays_on_its_gpu(
    see: See, monkeypatch: pytest.MonkeyPatch, model: nn.Module, device: str
) -> None:
    current = see(2)
    trainer, moved, _ = _training(model, device, monkeypatch)
    own = torch.device(device)
    assert trainer.args.device == trainer.accelerator.device == own
    assert moved == {own}
    assert set(current) <= {own}, "another GPU was opened"
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == SETTINGS.batch_size


@pytest.mark.parametrize(("num_gpus", "device"), [(2, "cuda:1"), (1, "cuda:0")])
def test_processes_that_train_together_take_a_gpu_each(
    see: See, monkeypatch: pytest.MonkeyPatch, model: nn.Module, num_gpus: int, device: str
) -> None:
    """The second of two, with both GPUs before it or with its own alone."""
    current = see(num_gpus, rank=1, processes=2)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    trainer, moved, wrapped = _training(model, device, monkeypatch)
    own = torch.device(device)
    assert trainer.accelerator.num_processes == 2
    assert trainer.args.device == trainer.accelerator.device == own
    assert moved == {own}
    assert wrapped == [[own.index]]
    assert set(current) <= {own}, "another GPU was opened"


def test_a_training_that_moves_the_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda trainer: trainer.model.to("meta"))
    told = r"the training moved the model from cpu to meta: transformers \d.* accelerate \d"
    with pytest.raises(ModelError, match=told):
        train(tiny_models.adapted("llama"), tiny_models.examples(2), SETTINGS, steps=1, seed=0)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_fresh_adapter_opens_no_other_gpu(
    see: See, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    see(4)
    base, opened = tiny_models.build("llama"), []
    monkeypatch.setattr("gradsift.models.lora.device_of", lambda model: torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda d: opened.append(torch.device(d)))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, d: None)
    attach_lora(base, LoraConfig(rank=2), seed=1)
    assert opened == [torch.device(device)] * (device != "cpu")

"""Which device is chosen, and that trainings stay on it: GPUs are made up, none is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

import tiny_models
from gradsift.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, WarmupConfig
from gradsift.errors import ModelError
from gradsift.models.devices import resolve_device, use_device
from gradsift.models.loading import load_base, load_encoder
from gradsift.models.lora import attach_lora, lora_pairs
from gradsift.models.training import train

SETTINGS = WarmupConfig(batch_size=2, learning_rate=1e-2)
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
See = Callable[..., list[torch.device]]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
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

    return see


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


def test_a_driver_needs_no_gpu_for_what_a_cluster_does(see: See, base: Path) -> None:
    see(0)
    model = ModelConfig(name=str(base), device="cuda")
    data = DataConfig(pool="p", targets={"t": "t"})
    assert load_encoder(model, data, EngineConfig(executor="ray"))
    with pytest.raises(ModelError, match="cannot use the device 'cuda'"):
        load_encoder(model, data, EngineConfig())


def test_two_processes_that_see_the_same_gpu_are_told(
    see: See, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two; each sees one GPU, which is its own if no other has claimed it."""
    see(1, rank=1, processes=2)
    store, config = torch.distributed.HashStore(), ModelConfig(name="x", device="cuda")
    for name, value in {"is_initialized": True, "get_rank": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    properties = SimpleNamespace(uuid="a1b2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert use_device(config) == use_device(config) == torch.device("cuda:0")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)  # as the first process finds it
    told = r"'cuda:0': the process of rank 1 has this GPU \(a1b2\) already, .* model.device=cpu"
    with pytest.raises(ModelError, match=told):
        use_device(config)
    assert use_device(ModelConfig(name="x", device="cpu")) == torch.device("cpu")
    properties.uuid = "c3d4"
    assert use_device(config) == torch.device("cuda:0")


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
) -> tuple[dict[str, Any], set[torch.device], list[Any]]:
    """Train on a made-up GPU; return what the Trainer says, where models went, DDP's devices."""
    told: dict[str, Any] = {}
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
        accelerator, arguments = trainer.accelerator, trainer.args
        accelerator.prepare(trainer.model)  # as its first step would
        told["devices"] = {arguments.device, accelerator.device}
        told["num_gpus"], told["batch_size"] = arguments.n_gpu, arguments.train_batch_size
        told["num_processes"] = accelerator.num_processes

    monkeypatch.setattr("gradsift.models.training.device_of", lambda model: torch.device(device))
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Parallel)
    monkeypatch.setattr(Trainer, "train", begin)
    train(model, tiny_models.examples(4), SETTINGS, steps=1, seed=0)
    return told, moved, wrapped


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_training_stays_on_its_gpu(
    see: See, monkeypatch: pytest.MonkeyPatch, model: nn.Module, device: str
) -> None:
    current = see(2)
    told, moved, _ = _training(model, device, monkeypatch)
    own = torch.device(device)
    assert told["devices"] == moved == {own}
    assert set(current) <= {own}, "another GPU was opened"
    assert told["num_gpus"] == 1
    assert told["batch_size"] == SETTINGS.batch_size


@pytest.mark.parametrize(("num_gpus", "device"), [(2, "cuda:1"), (1, "cuda:0")])
def test_processes_that_train_together_take_a_gpu_each(
    see: See, monkeypatch: pytest.MonkeyPatch, model: nn.Module, num_gpus: int, device: str
) -> None:
    """The second of two, with both GPUs before it or with its own alone."""
    current = see(num_gpus, rank=1, processes=2)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, value=value: value)
    told, moved, wrapped = _training(model, device, monkeypatch)
    own = torch.device(device)
    assert told["num_processes"] == 2
    assert told["devices"] == moved == {own}
    assert wrapped == [[own.index]]
    assert set(current) <= {own}, "another GPU was opened"


@pytest.fixture
def user() -> Iterator[Accelerator]:
    """A user's Accelerator, in the process in which gradsift trains."""
    states = (PartialState, AcceleratorState, GradientState)
    for state in states:
        state._shared_state.clear()
    yield Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    for state in states:
        state._shared_state.clear()


@pytest.mark.parametrize("fails", [False, True])
def test_a_users_accelerator_is_as_it_was_after_a_training(
    user: Accelerator, model: nn.Module, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen: list[tuple[str, int]] = []

    def fail(trainer: Trainer) -> None:
        ours = trainer.accelerator
        seen.append((ours.mixed_precision, ours.gradient_accumulation_steps))
        raise ModelError("enough")

    if fails:
        monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(ModelError, match="enough") if fails else nullcontext():
        train(model, tiny_models.examples(2), SETTINGS, steps=1, seed=0)
    assert seen == [("no", 1)] * fails, "the user's precision came into the training"
    assert (user.mixed_precision, user.gradient_accumulation_steps) == ("bf16", 4)
    assert user.device == torch.device("cpu")
    again = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    assert again.state.mixed_precision == "bf16"


def test_a_training_that_moves_the_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda trainer: trainer.model.to("meta"))
    told = r"the training moved the model from cpu to meta: transformers \d.* accelerate \d"
    with pytest.raises(ModelError, match=told):
        train(tiny_models.adapted("llama"), tiny_models.examples(2), SETTINGS, steps=1, seed=0)


def test_a_fresh_adapter_is_drawn_without_a_gpu(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither opened nor seeded anew: what the user draws there afterwards stays the same."""
    see(4)
    base, touched = tiny_models.build("llama"), []
    for name in ("manual_seed_all", "manual_seed", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: touched.append(name))
    before = torch.get_rng_state()
    attach_lora(base, LoraConfig(rank=2), seed=1)
    assert not touched
    assert torch.get_rng_state().equal(before)


def test_a_default_device_of_the_user_changes_no_fresh_adapter() -> None:
    drawn = []
    for default in ("cpu", "meta"):
        base = tiny_models.build("llama")
        with torch.device(default):
            pairs = lora_pairs(attach_lora(base, LoraConfig(rank=2), seed=1))
        drawn.append(next(iter(pairs.values())).a.weight)
    assert drawn[0].equal(drawn[1])

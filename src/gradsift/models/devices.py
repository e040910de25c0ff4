"""The device of a model: chosen, made the current one, and kept through a training."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import accelerate
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.environment import patch_environment
from torch import nn
from transformers import TrainingArguments

from gradsift.config import ModelConfig
from gradsift.errors import ModelError
from gradsift.executors.processes import first_claim, is_distributed


def resolve_device(config: ModelConfig) -> torch.device:
    """Return the device asked for; `auto` is CUDA where there is one, else the CPU.

    `cuda` is the first GPU. Of several processes that torchrun, `accelerate launch` or Ray Train
    began on a machine, each has its own: the only one that it sees, else the one of its number
    there (`LOCAL_RANK`). No GPU is opened for the answer.

    Raises:
        ModelError: If there is no such device here, or if processes would have to share it.
    """
    asked = config.device
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        asked = "cuda" if num_gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", asked):
        raise ModelError(
            f"cannot use the device {asked!r}: expected auto, cpu, cuda or, by number, cuda:0"
        )
    if asked == "cpu":
        return torch.device("cpu")
    number = asked.partition(":")[2]
    index = int(number) if number else _own_gpu(num_gpus)
    if index >= num_gpus:
        raise ModelError(
            f"cannot use the device {asked!r}: GPUs that PyTorch {torch.__version__} finds here: "
            f"{num_gpus}; see nvidia-smi and CUDA_VISIBLE_DEVICES, or set model.device=cpu"
        )
    _, num_processes = local_processes()
    if number and num_processes > 1 and num_gpus > 1:
        raise ModelError(
            f"cannot use the device {asked!r} in {num_processes} processes on this machine: all "
            "would share one GPU; with model.device=cuda each takes its own (CUDA_VISIBLE_DEVICES "
            "says which ones there are)"
        )
    return torch.device("cuda", index)


def _own_gpu(num_gpus: int) -> int:
    """Return the number of the GPU that is this process's own; 0 if it sees only one."""
    rank, num_processes = local_processes()
    if num_gpus <= 1:
        return 0
    if num_processes > num_gpus:
        raise ModelError(
            f"{num_processes} processes on this machine cannot share {num_gpus} GPUs: launch one "
            f"for each (torchrun --nproc-per-node {num_gpus}, accelerate launch --num_processes "
            f"{num_gpus}), or set model.device=cpu"
        )
    return rank


def local_processes() -> tuple[int, int]:
    """Return this process's number on its machine, and how many were begun together there."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return rank, int(os.environ.get("LOCAL_WORLD_SIZE", str(rank + 1)))


def use_device(config: ModelConfig) -> torch.device:
    """Return the device asked for, made the current one: `cuda` without a number is then this one.

    Raises:
        ModelError: As `resolve_device`, if the GPU cannot be opened, or if another of the processes
            that work together has it.
    """
    device = resolve_device(config)
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:  # busy, or broken
            reason = str(error).partition("\n")[0]
            raise ModelError(f"cannot use the device {str(device)!r}: {reason}") from error
        _refuse_shared(device)
    return device


def _refuse_shared(device: torch.device) -> None:
    """Make sure that no other process of the launch has this GPU: all may see the same one alone.

    Raises:
        ModelError: If one has.
    """
    if not is_distributed():
        return
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    if (owner := first_claim(gpu)) is not None:
        raise ModelError(
            f"cannot use the device {str(device)!r}: the process of rank {owner} has this GPU "
            f"({gpu}) already, and two cannot share one; launch one process for each GPU, or set "
            "model.device=cpu"
        )


@contextmanager
def kept_in_place(model: nn.Module) -> Iterator[None]:
    """Make sure that a training leaves the model on its devices, and accelerate to its user.

    What accelerate knows of the process (processes, precision, accumulated gradients) is the
    training's own meanwhile: a user's `Accelerator` is as it was before.

    Raises:
        ModelError: If a parameter has moved.
    """
    before = [parameter.device for parameter in model.parameters()]
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, kept, strict=True):
            state.clear()
            state.update(values)
    after = [parameter.device for parameter in model.parameters()]
    if after != before:
        [old, new] = (", ".join(sorted({str(d) for d in devices})) for devices in (before, after))
        raise ModelError(
            f"the training moved the model from {old} to {new}: transformers "
            f"{transformers.__version__} and accelerate {accelerate.__version__} place models in "
            "another way than this program knows; let CUDA_VISIBLE_DEVICES leave it one GPU and "
            "set model.device=cuda"
        )


class PlacedArguments(TrainingArguments):
    """Arguments of a Trainer that stays on the device where the model is.

    As it comes it opens the first GPU, moves every model there, and spreads batches over all GPUs
    that there are. What is replaced is in `TrainingArguments._setup_devices` and in accelerate's
    `PartialState.set_device` and `Accelerator.prepare_model` (read in transformers 5.23 and
    accelerate 1.15); `kept_in_place` finds out should others do it in another way.
    """

    def __init__(self, model_device: torch.device, **arguments: Any) -> None:
        self._model_device = model_device
        super().__init__(**arguments)

    @cached_property
    def _setup_devices(self) -> torch.device:
        device = self._model_device
        with patch_environment(accelerate_torch_device=device):
            state = PartialState(cpu=self.use_cpu)
        if state.use_distributed and device.type == "cuda":
            # DDP and barriers take it for the GPU's number, which it is not if each sees one GPU
            state.local_process_index = device.index
        self.distributed_state = state
        self._n_gpu = int(device.type == "cuda")
        return device

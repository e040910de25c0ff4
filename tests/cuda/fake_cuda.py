"""Two GPUs that are not there, in a process whose PyTorch was built without CUDA.

`stand_in.cpp` lets autograd take tensors that say they are on `cuda:0` or `cuda:1`; it has to be
loaded before torch is imported. What else a CPU build lacks is put in place here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from streams import Event, Stream, Streams
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

COUNT = 2
MEMORY = 1 << 36  # bytes of each, all free


class FakeCuda:
    """The two GPUs: their streams, and what host memory is pinned."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.streams = Streams(library.current_device)
        self.opened: set[int] = set()  # for their random numbers
        self._pinned: dict[int, object] = {}  # with the storage, so that none takes its place

    def install(self) -> None:
        """Put everything in place, for the rest of the process."""
        self._library.register_guard()
        # constants are made on the host and copied, as with a GPU that is not initialised yet
        FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment]
        nn.Module._apply = _put_in_place
        torch.tensor, torch.empty = _tensor, self._empty  # type: ignore[assignment]
        Tensor.numpy, Tensor.tolist = _numpy, _tolist  # type: ignore[assignment]
        for name, value in self._functions().items():
            assert hasattr(torch.cuda, name), name
            setattr(torch.cuda, name, value)

        def record_stream(tensor: Tensor, stream: Stream) -> None:
            self.streams.share(tensor, stream)

        def pin_memory(tensor: Tensor) -> Tensor:
            return self._pin(tensor)

        Tensor.record_stream, Tensor.pin_memory = record_stream, pin_memory  # type: ignore[assignment]

    def _functions(self) -> dict[str, Any]:
        return {
            "Event": Event,
            "Stream": Stream,
            "current_device": self._library.current_device,
            "current_stream": self.streams.current,
            "device_count": lambda: COUNT,
            "empty_cache": lambda: None,
            "get_device_capability": lambda _=None: (9, 0),
            "get_rng_state": self._open,
            "is_available": lambda: True,
            "is_bf16_supported": lambda *_: True,
            "max_memory_allocated": lambda _=None: 0,
            "mem_get_info": lambda _=None: (MEMORY, MEMORY),
            "memory_allocated": lambda _=None: 0,
            "memory_reserved": lambda _=None: 0,
            "reset_peak_memory_stats": lambda _=None: None,
            "set_device": lambda device: self._library.set_device(_index(device)),
            "set_rng_state": lambda _, device: None,
            "stream": self.streams.within,
        }

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in pinned host memory."""
        return tensor.untyped_storage()._cdata in self._pinned

    def _open(self, device: torch.device | str | int) -> Tensor:
        """Stand in for `get_rng_state`, which opens a GPU wherever it is called."""
        self.opened.add(_index(device))
        return torch.zeros(16, dtype=torch.uint8)

    def _empty(self, *size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = _plain_empty(*size, **options)
        return self._pin(made) if pin_memory else made

    def _pin(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", "only host memory can be pinned"
        pinned = torch.empty_like(tensor)
        storage = pinned.untyped_storage()
        self._pinned[storage._cdata] = storage
        return pinned


def _index(device: torch.device | str | int) -> int:
    return device if isinstance(device, int) else torch.device(device).index


_plain_numpy, _plain_tensor, _plain_empty = Tensor.numpy, torch.tensor, torch.empty


def _numpy(tensor: Tensor, **options: Any) -> np.ndarray:
    """Return ones where a tensor has no content."""
    if not isinstance(tensor, FakeTensor):
        return _plain_numpy(tensor, **options)
    assert tensor.device.type == "cpu", "only host memory can become an array"
    return np.ones(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _tolist(tensor: Tensor) -> Any:
    return tensor.cpu().numpy().tolist()  # which waits, if it is on a GPU


def _tensor(data: Any, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
    """Make a constant as torch does: on the host, and then a copy that is waited for."""
    made = _plain_tensor(data, **options)
    return made if device is None else made.to(device)


@torch.no_grad()
def _put_in_place(
    module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Convert parameters and buffers by new ones: fake tensors cannot change their own device."""
    for child in module.children() if recurse else ():
        child._apply(convert)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else convert(buffer)
    for name, parameter in module._parameters.items():
        if parameter is not None and (found := convert(parameter)) is not parameter:
            module._parameters[name] = nn.Parameter(found, parameter.requires_grad)
    return module


def adapt_libraries() -> None:
    """Have batches laid out where they are used, as a fake mode belongs to one thread.

    And let transformers take the ways that it takes with a real GPU: it would look for fake
    tensors, and not for packed sequences.
    """
    from transformers import masking_utils

    from gradsift.models import batches, fused

    def in_turn(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
        yield from items

    def of_numbers(recognise: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def outside(given: Any) -> Any:
            with unset_fake_temporarily():
                return recognise(given)

        return outside

    batches.prefetch = in_turn  # type: ignore[assignment]
    for name in ("norm_law", "is_rotary"):  # they compare numbers, on the host
        setattr(fused, name, of_numbers(getattr(fused, name)))
    masking_utils.is_tracing = lambda *_: False

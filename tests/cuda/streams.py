"""CUDA's streams and events, as far as the order that they give to work can be checked.

Each stream has a clock for itself and for what it knows of the others (Lamport, 1978; Fidge, 1988):
an event carries the clock of its stream, and waiting for it adds what it carries. Two uses of the
same memory, at least one of which writes, must be in an order that holds on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


class StreamError(AssertionError):
    """Work on two streams has no order, or memory may be given away while it is in use."""


class Event:
    """What its stream had been given, and knew of, when it was recorded."""

    def __init__(self, **_: object) -> None:
        self.clock: dict[Stream, int] = {}


class Stream:
    """A queue of work on a device."""

    def __init__(self, device: torch.device | str | int | None = None, **_: object) -> None:
        index = torch.device("cuda", device) if isinstance(device, int) else device
        self.device = torch.device(index or "cuda:0")
        self.clock: dict[Stream, int] = {self: 0}

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.clock = dict(self.clock)
        return event

    def wait_event(self, event: Event) -> None:
        for stream, tick in event.clock.items():
            self.clock[stream] = max(tick, self.clock.get(stream, 0))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())


@dataclass(frozen=True)
class Use:
    """A piece of work that reads or writes a part of a storage."""

    what: str
    stream: Stream
    tick: int
    part: range
    writes: bool


class Streams:
    """The current stream of each device and thread, and who used memory that streams share."""

    def __init__(self, current_device: Callable[[], int]) -> None:
        self._current_device = current_device
        self._default: dict[int, Stream] = {}
        self._chosen = threading.local()
        self._shared: dict[int, set[Stream]] = {}
        self._uses: dict[int, list[Use]] = {}
        self._kept: list[object] = []  # so that no storage takes the place of another

    def current(self, device: torch.device | str | int | None = None) -> Stream:
        """Return a device's current stream; without one, that of this thread's current device."""
        index = device if isinstance(device, int) else None
        if isinstance(device, torch.device | str):
            index = torch.device(device).index
        index = self._current_device() if index is None else index
        chosen = self._chosen_here()
        return chosen.get(index) or self._default.setdefault(index, Stream(index))

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        """Make a stream its device's current one for a while, in this thread."""
        chosen, index = self._chosen_here(), stream.device.index
        before = chosen.pop(index, None)
        chosen[index] = stream
        try:
            yield
        finally:
            del chosen[index]
            if before:
                chosen[index] = before

    def defaults(self) -> list[Stream]:
        """Return the streams on which work runs that nobody gave to another."""
        return [*self._default.values()]

    def _chosen_here(self) -> dict[int, Stream]:
        return vars(self._chosen).setdefault("streams", {})

    def share(self, tensor: Tensor, stream: Stream) -> None:
        """Stand in for `record_stream`: the tensor's memory is used on that stream too."""
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        self._shared.setdefault(storage._cdata, set()).add(stream)

    def use(self, tensor: Tensor, device: torch.device, what: str, writes: bool) -> None:
        """Give a use of a tensor to the current stream of its device.

        Raises:
            StreamError: If an earlier use is in no order with it, or if nobody told the allocator.
        """
        stream, key = self.current(device), tensor.untyped_storage()._cdata
        if stream not in self.defaults() and stream not in self._shared.get(key, ()):
            raise StreamError(f"{what} on another stream uses memory that has no record_stream")
        if key not in self._shared:
            return
        stream.clock[stream] += 1
        use = Use(what, stream, stream.clock[stream], _part(tensor), writes)
        for other in self._uses.setdefault(key, []):
            overlap = max(use.part.start, other.part.start) < min(use.part.stop, other.part.stop)
            ordered = other.tick <= stream.clock.get(other.stream, 0)
            if overlap and not ordered and (writes or other.writes):
                raise StreamError(f"{what} does not wait for {other.what} on another stream")
        self._uses[key].append(use)


def _part(tensor: Tensor) -> range:
    start = tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return range(start, start + 1 + sum((size - 1) * step for size, step in steps))

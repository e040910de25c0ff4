"""What a GPU would hold against a line of code: mixed dtypes, waits, races, too much memory.

Under FakeTensorMode tensors have shape, dtype and device, and no content. It refuses operations on
tensors of different devices and of shapes that do not fit; what it lets pass is found here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from fake_cuda import FakeCuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = frozenset({
    "addbmm", "addmm", "addmm_", "addmv", "baddbmm", "bmm", "dot", "mm", "mv", "vdot",
    "_grouped_mm",
})  # fmt: skip
# what asks the device for a value, or for how many there are
WAITS = frozenset({
    "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero",
    "masked_select", "nonzero", "unique_consecutive", "unique_dim",
})  # fmt: skip
INDEXING = frozenset({"_index_put_impl_", "index", "index_put", "index_put_"})
COPIES = frozenset({"_to_copy", "copy", "copy_"})


class DtypeError(AssertionError):
    """The factors of a matrix product have different dtypes."""


class DeviceError(AssertionError):
    """A tensor goes from one GPU to another."""


class Watch(TorchDispatchMode):
    """Counts what waits for a device, by the function that does it, and refuses what is wrong.

    A value that is waited for is made up (1, true): the work goes on. `largest`, in bytes: a
    larger tensor on a GPU is out of memory.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper takes a third of the time

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.waits: Counter[str] = Counter()
        self.products: Counter[torch.dtype] = Counter()
        self.largest = sys.maxsize

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # it asks for a tensor's device or shape
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if name in PRODUCTS:
            self._check_product(name, given)
        if on_gpu := [tensor for tensor in given if device_of(tensor).type == "cuda"]:
            self._note(func, name, args, on_gpu)
        if name in COPIES:
            self._check_copy(name, args, kwargs)
        if name == "_local_scalar_dense":
            return _made_up(args[0])
        found = func(*args, **kwargs)
        self._check_memory(found)
        return found

    def _check_product(self, name: str, given: list[Tensor]) -> None:
        dtypes = {tensor.dtype for tensor in given if tensor.is_floating_point()}
        if len(dtypes) > 1:
            raise DtypeError(f"{name} of {' and '.join(sorted(map(str, dtypes)))}")
        self.products.update(dtypes)

    def _note(self, func: Any, name: str, args: tuple[Any, ...], given: list[Tensor]) -> None:
        by_mask = name in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        counts = name == "repeat_interleave" and func._overloadname == "Tensor"
        if name in WAITS or by_mask or counts:
            self.note_wait(name)
        if func.is_view:
            return
        written = {
            id(value)
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        for tensor in given:
            self.cuda.streams.use(tensor, device_of(tensor), name, writes=id(tensor) in written)

    def _check_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a copy between host and device for which the caller waits."""
        if name == "_to_copy":
            source, pinned_into = args[0], False
            into = kwargs.get("device") or device_of(source)
            waits = not kwargs.get("non_blocking", False)
        else:
            into, source = device_of(args[0]), args[1]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            pinned_into = self.cuda.is_pinned(args[0])
        device = device_of(source)
        if device.type != into.type:
            host_is_pinned = self.cuda.is_pinned(source) or pinned_into
            if waits or not host_is_pinned:
                self.note_wait(f"copy from {device.type} to {into.type}")
        elif device.type == "cuda" and device != into:
            raise DeviceError(f"{name} from {device} to {into}")

    def _check_memory(self, found: Any) -> None:
        for tensor in _tensors([found]):
            size = tensor.numel() * tensor.itemsize
            if size > self.largest and device_of(tensor).type == "cuda":
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} B")

    def take(self) -> dict[str, int]:
        """Return the waits so far, and count anew."""
        taken, self.waits = dict(self.waits), Counter()
        return taken

    def note_wait(self, what: str) -> None:
        """Count a wait of the function of ours, or of a library on ours, that is running."""
        self.waits[f"{what} in {next(_callers(), 'a place unknown')}"] += 1


def device_of(tensor: Tensor) -> torch.device:
    """Return where a tensor is; of a fake one, without asking the fake mode."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _made_up(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _callers() -> Iterator[str]:
    """Yield the functions that are running, the innermost first, without torch's and these."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in (
            "torch",
            "watch",
            "contextlib",
            "fake_cuda",
            "unittest",
        ):
            yield f"{module}.{frame.f_code.co_qualname}"

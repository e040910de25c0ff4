"""Faults as they would be in the code, planted one at a time into a pass over the pool."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from cases import EXAMPLES, THREE, Scene, basis_read_by_caller, build, make_basis, prepare, run
from fake_cuda import FakeCuda
from streams import Stream
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from watch import Watch

from gradsift.gradients import projection
from gradsift.gradients.per_example import blocks

Fault = Callable[[Scene, Watch], None]


def main(library: ctypes.CDLL) -> None:
    """Run each planted fault on the second GPU, in bfloat16."""
    cuda = prepare(library)
    with FakeTensorMode(allow_non_fake_inputs=False):
        scene = build("llama", "cuda:1", "bfloat16")
        planted = in_blocks() | in_batches() | in_streams(cuda)
        for name, fault in planted.items():
            run(name, fault, scene, cuda)


def pass_over(scene: Scene, watch: Watch, offloaded: bool, **changes: Tensor) -> None:
    basis = make_basis(scene, offloaded, **changes)
    watch.take()
    projection.project(scene.model, EXAMPLES, THREE, basis)


def in_blocks() -> dict[str, Fault]:
    """Return faults of one block of the basis."""

    def changed(scene: Scene, watch: Watch, change: Callable[[Tensor], Tensor]) -> None:
        name, (height, width) = [*blocks(scene.model).items()][3]
        block = torch.empty(3, height * width, dtype=scene.dtype, device=scene.device)
        pass_over(scene, watch, offloaded=False, **{name: change(block)})

    return {
        "block on the host": partial(changed, change=lambda block: block.cpu()),
        "block on another GPU": partial(
            changed, change=lambda block: torch.empty_like(block, device="cuda:0")
        ),
        "block of another dtype": partial(changed, change=lambda block: block.float()),
        "block of another shape": partial(changed, change=lambda block: block[:, 1:]),
    }


def in_batches() -> dict[str, Fault]:
    """Return waits that hide in a batch."""

    def hidden(scene: Scene, watch: Watch, wait: Callable[[Tensor], object]) -> None:
        plain = projection.product

        def product(left: Tensor, right: Tensor) -> Tensor:
            wait(left)
            return plain(left, right)

        with patch.object(projection, "product", product):
            pass_over(scene, watch, offloaded=False)

    def branch(left: Tensor) -> object:
        return 0 if left.isfinite().all() else 1

    waits: dict[str, Callable[[Tensor], object]] = {
        "value asked for": lambda left: left.sum().item(),
        "branch on a value": branch,
        "copy to the host": lambda left: left.cpu(),
        "constant from a list": lambda left: torch.tensor([1.0], device=left.device),
        "copy from pageable memory": lambda left: torch.ones(3).to(left.device, non_blocking=True),
        "rows by a mask": lambda left: left[left[:, 0] > 0],
    }
    planted: dict[str, Fault] = {n: partial(hidden, wait=wait) for n, wait in waits.items()}
    return planted | {"lookup of a library": look_for_packed_sequences}


def look_for_packed_sequences(scene: Scene, watch: Watch) -> None:
    """Call the model as transformers has it, which then waits in every batch."""
    ids = torch.zeros(2, 9, dtype=torch.long, device=scene.device)
    scene.model(input_ids=ids, use_cache=False)


def in_streams(cuda: FakeCuda) -> dict[str, Fault]:
    """Return faults in the order of copies and work."""
    wait_event, defaults = Stream.wait_event, cuda.streams.defaults

    def unless(skip: Callable[[Stream], bool]) -> AbstractContextManager[Any]:
        def wait(stream: Stream, event: Any) -> None:
            if not skip(stream):
                wait_event(stream, event)

        return patch.object(Stream, "wait_event", wait)

    def without(fault: AbstractContextManager[Any], case: Fault) -> Fault:
        def planted(scene: Scene, watch: Watch) -> None:
            with fault:
                case(scene, watch)

        return planted

    offloaded = partial(pass_over, offloaded=True)
    untold = patch.object(Tensor, "record_stream", lambda tensor, stream: None)
    here = patch.object(torch.cuda, "current_stream", lambda device=None: cuda.streams.current())
    return {
        "work that does not wait for its block": without(
            unless(lambda stream: stream in defaults()), offloaded
        ),
        "copy that does not wait for the work before it": without(
            unless(lambda stream: stream not in defaults()), offloaded
        ),
        "memory of which the allocator is not told": without(untold, offloaded),
        "stream of the current device": without(here, basis_read_by_caller),
    }

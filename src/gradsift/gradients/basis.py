"""The bases of all targets, stacked: on the device as far as they fit, else in host memory.

An offloaded block is copied while the backward pass is still at the block before
it. Where a block lies changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from math import prod

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.config import Config
from gradsift.data.encoding import Encoded
from gradsift.errors import ModelError
from gradsift.gradients.gram import FLOAT_BYTES
from gradsift.gradients.memory import basis_memory, host_memory, small_batch
from gradsift.gradients.per_example import blocks, each_batch, gradient_scale
from gradsift.gradients.pinned import pieces_for, pinned
from gradsift.models.batch_size import within_memory
from gradsift.models.batches import device_of, group_examples, lengths_of, to_device

_ALIGNED = 256  # entries
_ROUND = 64  # bytes
Shapes = Mapping[str, tuple[int, int]]
"""Each block's shape (out, in) by its name."""


class Basis:
    """`basis[name]` is one block of it, (direction, parameter), on the device.

    A block is valid until the next is asked for: offloaded blocks share two buffers.
    """

    def __init__(
        self,
        blocks: Mapping[str, Float[Tensor, "direction _"]],
        offloaded: frozenset[str],
        device: torch.device,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Take the blocks, those that are `offloaded` from host memory (pinned, for a GPU).

        `ranks`: how many of the directions belong to each target; by default there is one.
        """
        self._blocks, self._offloaded = blocks, offloaded
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._after: dict[str, str] = {}  # the order in which offloaded blocks are asked for
        self._last: str | None = None
        self._prefetched: tuple[str, Tensor, torch.Event | None] | None = None
        largest = max((blocks[name].numel() for name in offloaded), default=0)
        first = next(iter(blocks.values()))
        self.rank, self._free = len(first), 0
        self.ranks = [self.rank] if ranks is None else [*ranks]
        # both begin at a round address, as a block of its own does: else a matrix product may take
        # another kernel for them, and other bits come out
        width = -(-largest // _ALIGNED) * _ALIGNED
        self._slots = torch.empty(2, width, dtype=first.dtype, device=device)
        if self._stream:
            self._slots.record_stream(self._stream)  # a copy may still run when they are freed

    def parts(self, name: str) -> list[Float[Tensor, "direction _"]]:
        """Return the parts of a block that belong to each target.

        At a round address each, as one alone would be: see `__init__`.
        """
        parts = self[name].split(self.ranks)
        return [part if part.data_ptr() % _ROUND == 0 else part.clone() for part in parts]

    def __getitem__(self, name: str) -> Float[Tensor, "direction _"]:
        if name not in self._offloaded:
            return self._blocks[name]
        if self._last is not None:
            self._after[self._last] = name
        self._last = name
        # whatever uses the other slot has been handed to the device by now
        user = torch.cuda.current_stream(self._device) if self._stream else None
        released = user.record_event() if user else None
        if self._prefetched is None or self._prefetched[0] != name:
            self._prefetch(name, released)
        assert self._prefetched is not None
        (_, block, arrived), self._prefetched = self._prefetched, None
        if user and arrived:
            user.wait_event(arrived)
        self._free = 1 - self._free
        if name in self._after:
            self._prefetch(self._after[name], released)
        return block

    def _prefetch(self, name: str, released: torch.Event | None) -> None:
        """Begin to copy a block into the slot that is not in use."""
        host = self._blocks[name]
        block = self._slots[self._free, : host.numel()].view(host.shape)
        side: AbstractContextManager[object] = nullcontext()
        if self._stream and released:
            self._stream.wait_event(released)
            side = torch.cuda.stream(self._stream)
        with side:
            block.copy_(host, non_blocking=True)
        self._prefetched = (name, block, self._stream.record_event() if self._stream else None)


def choose_offloaded(
    shapes: Shapes, rank: int, itemsize: int, device: torch.device, memory: int
) -> frozenset[str]:
    """Return the blocks to offload to host memory so that the rest keeps within `memory`.

    Raises:
        ModelError: If even host memory does not suffice.
    """
    sizes = {name: rank * prod(shape) * itemsize for name, shape in shapes.items()}
    total = sum(sizes.values())
    if total <= memory:
        return frozenset()
    advice = "lower gist.rank or lora.rank, or give fewer targets at once"
    if device.type == "cpu":
        raise ModelError(
            f"the bases of all targets ({rank} directions) take {total / 2**30:.3g} GiB, more than "
            f"the {memory / 2**30:.3g} GiB that three quarters of engine.memory (--memory) are; "
            f"raise it, or {advice}"
        )
    room = memory - 2 * max(sizes.values())  # two slots for those that are brought
    # spread evenly over the layers, so that each copy has a whole layer's time
    offloaded, here, reached = set(), 0, 0
    for name, size in sizes.items():
        reached += size
        if (here + size) * total <= room * reached:
            here += size
        else:
            offloaded.add(name)
    pieces, _ = pieces_for({name: size for name, size in sizes.items() if name in offloaded})
    needed, available = sum(pieces), host_memory()
    if needed > available or room < 0:
        raise ModelError(
            f"the bases of all targets ({rank} directions) take {total / 2**30:.3g} GiB; "
            f"{memory / 2**30:.3g} GiB fit on {device} and {available / 2**30:.1f} GiB in host "
            f"memory; {advice}"
        )
    return frozenset(offloaded)


def _offloaded(choose: Callable[[int], frozenset[str]], most: int, wanted: int) -> frozenset[str]:
    """Return the blocks to offload so that `wanted` bytes stay, or `most` if not all can wait."""
    if wanted < most:
        with suppress(ModelError):
            return choose(wanted)
    return choose(most)


def build_basis(
    model: nn.Module,
    targets: Sequence[tuple[Sequence[Encoded], Float[np.ndarray, "_ _"]]],
    max_tokens: int,
    memory: int,
    kept: int | None = None,
) -> Basis:
    """Return combinationᵀ G of each target, one below the other, block by block.

    `targets`: examples, and a combination (query × rank) of their gradients. `memory`: bytes that
    it may take, of which it keeps `kept`, or more where the rest does not fit into host memory.

    With combination = U/σ these are the right singular vectors of G: the basis of its subspace.
    Added up in float32, in parts, each a pass over the targets and as large as what is kept so far
    leaves room for; kept in the model's precision on a GPU and in float32 on the CPU.

    Raises:
        ModelError: If they fit neither into `memory` bytes of the device nor into host memory.
    """
    shapes, device, dtype = blocks(model), device_of(model), dtype_kept(model)
    rank = sum(combination.shape[1] for _, combination in targets)
    # on a GPU only as much stays free for sums: what waits in host memory is brought for each batch
    free = memory // 4 if device.type == "cpu" else _largest_sums(shapes, rank)
    most = max(0, memory - free)
    choose = partial(choose_offloaded, shapes, rank, dtype.itemsize, device)
    offloaded = _offloaded(choose, most, most if kept is None else min(most, kept))
    done: dict[str, Tensor] = {}
    waiting = pinned({n: (rank, prod(s)) for n, s in shapes.items() if n in offloaded}, dtype)
    while len(done) < len(shapes):
        here = sum(block.nbytes for name, block in done.items() if name not in offloaded)
        left = {name: shape for name, shape in shapes.items() if name not in done}
        part = first_part(left, (memory - here) // (FLOAT_BYTES * max(1, rank)))
        added_up = [
            _combine_rows(model, examples, combination, part, max_tokens)
            for examples, combination in targets
        ]
        for name in part:
            block = torch.cat([own.pop(name) for own in added_up]).to(dtype)
            done[name] = waiting[name].copy_(block) if name in offloaded else block
    return Basis(done, offloaded, device, [own.shape[1] for _, own in targets])


def _combine_rows(
    model: nn.Module,
    examples: Sequence[Encoded],
    combination: Float[np.ndarray, "query rank"],
    shapes: Shapes,
    max_tokens: int,
) -> dict[str, Float[Tensor, "rank _"]]:
    weights = to_device(combination.astype(np.float32), device_of(model)) / gradient_scale(model)
    sums = {
        name: torch.zeros(weights.shape[1], prod(shape), device=weights.device)
        for name, shape in shapes.items()
    }
    groups = group_examples(model, examples, max_tokens)
    for group, backpropagate in each_batch(model, examples, groups):
        shares = weights[to_device(group, weights.device)].T

        def accumulate(name: str, gradient: Tensor, shares: Tensor = shares) -> None:
            if name in sums:
                sums[name].addmm_(shares, gradient.flatten(1).float())

        backpropagate(accumulate)
    return sums


def dtype_kept(model: nn.Module) -> torch.dtype:
    """Return the precision of a basis: the model's on a GPU, float32 on the CPU."""
    dtype = model.dtype if device_of(model).type == "cuda" else torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


def _largest_sums(shapes: Shapes, rank: int) -> int:
    """Return the bytes of the largest block while it is added up."""
    return FLOAT_BYTES * rank * max(map(prod, shapes.values()))


def whole_bytes(shapes: Shapes, rank: int, itemsize: int) -> int:
    """Return the bytes that a basis takes of a GPU on which all of it stays, sums included."""
    kept = itemsize * rank * sum(map(prod, shapes.values()))
    return kept + _largest_sums(shapes, rank)


def first_part(shapes: Shapes, num_parameters: int) -> Shapes:
    """Return the first blocks that have at most so many parameters together, one at least."""
    part: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        num_parameters -= prod(shape)
        if part and num_parameters < 0:
            break
        part[name] = shape
    return part


def fitting_basis(
    model: nn.Module,
    targets: Sequence[tuple[Sequence[Encoded], Float[np.ndarray, "_ _"]]],
    config: Config,
) -> Basis:
    """Return `build_basis` of the targets, in parts and batches that fit.

    Raises:
        ModelError: If nothing does.
    """
    tokens, shapes = small_batch(config.engine), blocks(model)
    rank = sum(combination.shape[1] for _, combination in targets)
    lengths = np.concatenate([lengths_of(examples) for examples, _ in targets])
    whole = whole_bytes(shapes, rank, dtype_kept(model).itemsize)
    memory, kept = basis_memory(config, model, tokens, whole)
    work = partial(build_basis, model, targets, memory=memory, kept=kept)
    return within_memory(work, tokens, lengths)[0]

"""Batches of examples, prepared ahead of their use.

Examples of like length share a batch, right-padded, and a second thread lays the next ones out
while the device works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from gradsift.data.encoding import Encoded
from gradsift.errors import ModelError
from gradsift.models.kernels import kernels_for_batches
from gradsift.progress import count_batch

T = TypeVar("T")
Lengths = Int[np.ndarray, " example"]
"""Tokens of each example."""

_END = object()
MAX_EXAMPLES = 512
"""The most examples in a batch: more very short ones would fit, but not their gradients."""
# tensor cores take eights, and what is chosen or compiled by shape meets far fewer shapes;
# larger multiples pad too much (docs/tried.md)
_MULTIPLES = {"cuda": 8}
# what a batch takes beside its tokens, in tokens: so many, or that share of the most there may be
_OVERHEAD, _OVERHEAD_SHARE = 128, 1 / 16


@dataclass(frozen=True)
class Batch:
    """Right-padded examples, and where their labels are.

    `rows`, `columns`: the positions whose logits are needed; `labels`: the tokens that follow
    there; `weights`: one over the number of labels of that example.
    """

    input_ids: Int[Tensor, "example token"]
    rows: Int[Tensor, " label"]
    columns: Int[Tensor, " label"]
    labels: Int[Tensor, " label"]
    weights: Float[Tensor, " label"]

    @classmethod
    def of(
        cls,
        examples: Sequence[Encoded],
        device: torch.device,
        whole: bool = False,
        pad: Callable[[Lengths], Lengths] = lambda lengths: lengths,
    ) -> Batch:
        """Lay the examples out, each up to its last label: what follows cannot change its loss.

        Or as a whole, where more than the loss is wanted. `pad`: from their lengths to those that
        they take in a batch.
        """
        positions = [np.flatnonzero(example.supervised) for example in examples]
        lengths = [len(e.input_ids) for e in examples] if whole else [p[-1] for p in positions]
        width = int(pad(np.array(lengths)).max())
        input_ids = np.zeros((len(examples), width), dtype=np.int64)
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            input_ids[row, :length] = example.input_ids[:length]
        counts = [len(position) for position in positions]
        columns = np.concatenate(positions) - 1
        labels = np.concatenate(
            [example.input_ids[p] for example, p in zip(examples, positions, strict=True)]
        )
        rows = np.repeat(np.arange(len(examples)), counts)
        weights = np.repeat(1 / np.array(counts, dtype=np.float32), counts)
        arrays = (input_ids, rows, columns, labels.astype(np.int64), weights)
        return cls(*(to_device(array, device) for array in arrays))

    def at_labels(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "1 label feature"]:
        """Return what enters the output head at the positions that have a label, and there alone.

        Raises:
            ModelError: If it does not have the batch's shape.
        """
        if hidden.shape[:-1] != self.input_ids.shape:
            raise ModelError(
                f"cannot keep logits to the labels: what enters the output head has shape "
                f"{tuple(hidden.shape)}, expected (example, token, feature)"
            )
        return _AtPositions.apply(hidden.flatten(0, -2), self._positions).unsqueeze(0)  # type: ignore[union-attr]

    def spread(
        self, values: Float[Tensor, "label feature"]
    ) -> Float[Tensor, "example token feature"]:
        """Return what was found where there is a label in its place, zeros elsewhere."""
        shape = self.input_ids.shape
        return _Spread.apply(values, self._positions, shape.numel()).view(*shape, -1)  # type: ignore[union-attr]

    @property
    def _positions(self) -> Int[Tensor, " label"]:
        return self.rows * self.input_ids.shape[1] + self.columns

    def by_example(self, values: Shaped[Tensor, " label"]) -> Shaped[Tensor, " example"]:
        """Return the sum over each example's labels; each has its own place, so in no new order."""
        table = torch.zeros(self.input_ids.shape, dtype=values.dtype, device=values.device)
        table[self.rows, self.columns] = values
        return table.sum(1)


class _AtPositions(torch.autograd.Function):
    """Rows at positions of which no two are equal; autograd's own would add up where they land."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.num_rows = len(rows)
        return rows.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(grads[0], *ctx.saved_tensors, ctx.num_rows), None  # type: ignore[return-value]


class _Spread(torch.autograd.Function):
    """The opposite of `_AtPositions`: rows put where they came from, among zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(positions)
        return rows.new_zeros(num_rows, rows.shape[1]).index_copy_(0, positions, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _AtPositions.apply(grads[0], *ctx.saved_tensors), None, None  # type: ignore[return-value]


def device_of(model: nn.Module) -> torch.device:
    """Return where the model is."""
    return next(model.parameters()).device


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the array as a tensor; a GPU's work waits for the copy, the caller does not."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def lengths_of(examples: Sequence[Encoded]) -> Lengths:
    """Return how many tokens of each example enter the model: those before its last label."""
    return np.array([int(np.flatnonzero(example.supervised)[-1]) for example in examples])


def padded(model: nn.Module, lengths: Lengths) -> Lengths:
    """Return how many tokens examples of these lengths take in a batch, each by itself.

    As many as they have on a CPU; on a GPU the next multiple of 8, where the model has positions
    for that. What follows an example changes nothing of it (`check_causal`).
    """
    multiple = _MULTIPLES.get(device_of(model).type, 1)
    filled = -(-lengths // multiple) * multiple
    positions = positions_of(model)
    return filled if positions is None else np.where(filled <= positions, filled, lengths)


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens of an example the model has positions for, if it says so."""
    config: Any = getattr(model, "module", model).config  # of DDP's model, the one within
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def plan_batches(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, max_examples: int | None = None
) -> list[np.ndarray]:
    """Return groups of indices, longest first, each of at most `max_tokens` once padded.

    Of all ways to cut the examples, sorted by length, that with the fewest padded tokens, each
    batch counted as a few more. One that is longer than the budget has its own. `lengths`: as they
    are in a batch (`padded`).

    >>> [group.tolist() for group in plan_batches([3, 9, 3, 9], max_tokens=18)]
    [[1, 3], [0, 2]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    count, overhead = len(order), max(_OVERHEAD, max_tokens * _OVERHEAD_SHARE)
    costs, starts = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=int)
    costs[0] = 0
    for start, longest in enumerate(np.asarray(lengths)[order]):
        most = min(max(1, max_tokens // int(longest)), max_examples or count, count - start)
        stops = np.arange(start + 1, start + most + 1)
        found = costs[start] + overhead + longest * np.arange(1, most + 1)
        better = stops[found < costs[stops]]
        costs[better], starts[better] = found[better - start - 1], start
    groups, stop = [], count
    while stop:
        groups.append(order[starts[stop] : stop])
        stop = starts[stop]
    return groups[::-1]


def group_examples(
    model: nn.Module,
    examples: Sequence[Encoded],
    max_tokens: int,
    max_examples: int | None = None,
) -> list[np.ndarray]:
    """Return the groups of indices that share a batch of this model (`plan_batches`).

    Each of at most `max_examples`, or of `MAX_EXAMPLES`.
    """
    lengths = padded(model, lengths_of(examples))
    return plan_batches(lengths, max_tokens, max_examples or MAX_EXAMPLES)


def make_batches(
    model: nn.Module,
    examples: Sequence[Encoded],
    groups: Sequence[np.ndarray],
    whole: bool = False,
) -> Generator[Batch, None, None]:
    """Yield the batch of each group of indices, prepared while the one before it is in use.

    While they are in use the device's kernels are those for the model's batches. Whoever shows
    progress is told of each when the next one is asked for.
    """
    device, pad = device_of(model), partial(padded, model)
    on_stream = _stream_of_caller(device)

    def lay_out(group: np.ndarray) -> Batch:
        with on_stream():
            return Batch.of([examples[i] for i in group], device, whole, pad)

    batches = prefetch(map(lay_out, groups))
    with kernels_for_batches(model):
        for group, batch in zip(groups, batches, strict=True):
            yield batch
            count_batch(len(group), sum(len(examples[i].input_ids) for i in group))


def _stream_of_caller(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return what makes the stream that is current here current elsewhere: threads have their own.

    Copied on another stream, a batch might be used before it has arrived.
    """
    if device.type != "cuda":
        return nullcontext
    return partial(torch.cuda.stream, torch.cuda.current_stream(device))


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Yield the items, up to `depth` of them made beforehand on another thread.

    >>> list(prefetch(iter("abc")))
    ['a', 'b', 'c']
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        waiting = deque(thread.submit(next, items, _END) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(thread.submit(next, items, _END))
                yield item  # type: ignore[misc]
        finally:
            thread.shutdown(cancel_futures=True)

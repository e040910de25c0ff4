"""Per-example gradients of LoRA weights: one forward and one backward pass for a whole batch.

For `h = x Aᵀ` and `y = h Bᵀ`, the gradient of one example is a sum over its tokens,

    ∇A = Σ_t a'_t x_tᵀ        ∇B = Σ_t b'_t h_tᵀ

with a', b' the gradients that reach the outputs of A and B (Goodfellow, 2015, arXiv 1510.01799).
Both are at hand while the backward pass is at that layer, so each gradient is formed there in the
model's precision, handed on (what follows is float32 or better) and forgotten: no weight gradient
and no whole row is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsift.data import Encoded
from gradsift.errors import ModelError
from gradsift.model import LoraPair, lora_pairs

Consume = Callable[[str, Float[Tensor, "example out in"]], None]
"""Takes one block's name and the gradients of all the batch's examples for it."""

_LOGITS_AT_ONCE = 1 << 26  # float32 entries of one piece of the softmax: 256 MB


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
    def of(cls, examples: Sequence[Encoded], device: torch.device) -> Batch:
        """Lay the examples out, each up to its last label: what follows cannot change its loss."""
        positions = [np.flatnonzero(example.supervised) for example in examples]
        width = max(int(position[-1]) for position in positions)
        input_ids = np.zeros((len(examples), width), dtype=np.int64)
        for row, (example, position) in enumerate(zip(examples, positions, strict=True)):
            length = position[-1]
            input_ids[row, :length] = example.input_ids[:length]
        counts = [len(position) for position in positions]
        columns = np.concatenate(positions) - 1
        labels = np.concatenate(
            [example.input_ids[p] for example, p in zip(examples, positions, strict=True)]
        )
        rows = np.repeat(np.arange(len(examples)), counts)
        weights = np.repeat(1 / np.array(counts, dtype=np.float32), counts)
        arrays = (input_ids, rows, columns, labels.astype(np.int64), weights)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


def plan_batches(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Return groups of indices, longest first, each of at most `max_tokens` once padded.

    Examples of like length share a batch. One that is longer than the budget has its own.

    >>> [group.tolist() for group in plan_batches([3, 9, 2, 8], max_tokens=18)]
    [[1, 3], [0, 2]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups, start = [], 0
    while start < len(order):
        size = max(1, max_tokens // int(lengths[order[start]]))
        groups.append(order[start : start + size])
        start += size
    return groups


def blocks(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every LoRA matrix, by name, in the order of the layers."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, pair in lora_pairs(model).items():
        shapes[f"{name}.A"] = (pair.a.out_features, pair.a.in_features)
        shapes[f"{name}.B"] = (pair.b.out_features, pair.b.in_features)
    return shapes


class PerExampleGradients:
    """Taps on a model's LoRA layers for as long as the context is open.

    Each call runs one batch, hands every block's gradients to `consume` during the backward pass,
    and returns each example's loss: the mean negative log-likelihood of its supervised tokens.

    The model is frozen and in evaluation mode, padding is on the right and attention causal, so
    that no token of an example sees padding and none is masked.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the layers to tap.

        Raises:
            ModelError: If a layer's gradient cannot be measured exactly.
        """
        self._model = model
        self._pairs = lora_pairs(model)
        self._handles: list[Any] = []
        self._batch: Batch | None = None
        self._consume: Consume = lambda name, gradient: None

    def __enter__(self) -> PerExampleGradients:
        """Attach the taps."""
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        self._handles = [head.register_forward_pre_hook(self._only_labels)]
        for name, pair in self._pairs.items():
            self._handles += self._tap(name, pair)
        return self

    def __exit__(self, *_: object) -> None:
        """Take the taps off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, batch: Batch, consume: Consume) -> Float[Tensor, " example"]:
        """Return the losses of the batch, having handed on every block's gradients."""
        assert self._handles, "use it as a context manager"
        self._batch, self._consume = batch, consume
        with torch.enable_grad():
            logits = self._model(input_ids=batch.input_ids, use_cache=False).logits
            nll = token_losses(logits.flatten(0, -2), batch.labels) * batch.weights
            nll.sum().backward()
        losses = torch.zeros(len(batch.input_ids), dtype=torch.float32, device=nll.device)
        return losses.index_add_(0, batch.rows, nll.detach())

    def _tap(self, name: str, pair: LoraPair) -> Iterator[Any]:
        for suffix, module in zip("AB", pair, strict=True):
            yield module.register_forward_hook(partial(self._watch, f"{name}.{suffix}"))

    def _only_labels(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Trim what enters the output head to the positions that have a label."""
        assert self._batch is not None
        hidden, *rest = inputs
        return (hidden[self._batch.rows, self._batch.columns].unsqueeze(0), *rest)

    def _watch(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        entering = inputs[0].detach()
        if entering.dim() != 3 or len(entering) != len(self._batch.input_ids):  # type: ignore[union-attr]
            raise ModelError(
                f"cannot measure {name}: its input has shape {tuple(entering.shape)}, "
                "expected (example, token, feature)"
            )
        if not output.requires_grad:  # the first adapted layer: autograd begins here
            output = output.detach().requires_grad_()

        def hand_on(leaving: Tensor) -> None:
            gradient = torch.bmm(leaving.transpose(1, 2), entering.to(leaving.dtype))
            self._consume(name, gradient)

        output.register_hook(hand_on)
        return output


class _TokenLosses(torch.autograd.Function):
    """Negative log-likelihoods, their softmax in float32, in pieces, formed again on the way back.

    Autograd would keep the float32 softmax of the whole batch; this keeps the logits alone.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        normalisers = torch.cat([piece.float().logsumexp(-1) for piece in _pieces(logits)])
        ctx.save_for_backward(logits, labels, normalisers)
        return normalisers - logits.gather(1, labels[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        logits, labels, normalisers = ctx.saved_tensors
        inner = torch.empty_like(logits)
        parts = (_pieces(tensor, like=logits) for tensor in (logits, inner, labels, normalisers))
        for piece, into, label, normaliser, scale in zip(
            *parts, _pieces(outer[0], like=logits), strict=True
        ):
            softmax = (piece.float() - normaliser[:, None]).exp_()
            softmax[torch.arange(len(label), device=label.device), label] -= 1
            into.copy_(softmax.mul_(scale[:, None]))
        return inner, None


def token_losses(
    logits: Float[Tensor, "label vocabulary"], labels: Int[Tensor, " label"]
) -> Float[Tensor, " label"]:
    """Return the negative log-likelihood of each label, in nats and float32.

    >>> token_losses(torch.zeros(1, 8), torch.tensor([3])).item()  # log 8
    2.0794...
    """
    return _TokenLosses.apply(logits, labels)  # type: ignore[return-value]


def _pieces(tensor: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    vocabulary = (tensor if like is None else like).shape[1]
    return tensor.split(max(1, _LOGITS_AT_ONCE // vocabulary))


def gram_matrix(
    model: nn.Module, examples: Sequence[Encoded], max_tokens: int
) -> Float[np.ndarray, "query query"]:
    """Return G Gᵀ in float64, G holding one row of gradients per example.

    All rows are held on the host in float32, one block at a time in float64: the place to work in
    row blocks when they outgrow memory.
    """
    rows = {name: torch.zeros(len(examples), *shape) for name, shape in blocks(model).items()}
    for indices, backpropagate in each_batch(model, examples, max_tokens):
        here = indices.cpu()

        def keep(name: str, gradient: Tensor, here: Tensor = here) -> None:
            rows[name][here] = gradient.float().cpu()

        backpropagate(keep)
    gram = torch.zeros(len(examples), len(examples), dtype=torch.float64)
    for block in rows.values():
        flat = block.flatten(1).double()
        gram.addmm_(flat, flat.T)
    return gram.numpy()


def combine_rows(
    model: nn.Module,
    examples: Sequence[Encoded],
    combination: Float[np.ndarray, "query rank"],
    max_tokens: int,
) -> dict[str, Float[Tensor, "rank parameter"]]:
    """Return combinationᵀ G block by block, in float32 on the model's device.

    With combination = U/σ these are the right singular vectors of G: the basis of its subspace.
    """
    weights = torch.from_numpy(combination).float().to(_device(model))
    result = {
        name: torch.zeros(weights.shape[1], out * into, device=weights.device)
        for name, (out, into) in blocks(model).items()
    }
    for indices, backpropagate in each_batch(model, examples, max_tokens):
        shares = weights[indices].T

        def accumulate(name: str, gradient: Tensor, shares: Tensor = shares) -> None:
            result[name].addmm_(shares, gradient.flatten(1).float())

        backpropagate(accumulate)
    return result


@dataclass(frozen=True)
class Projections:
    """What one pass over a range of examples yields, row by row, on the host."""

    coordinates: Float[Tensor, "example rank"]
    losses: Float[Tensor, " example"]
    gradient_norms: Float[Tensor, " example"]


def project(
    model: nn.Module,
    examples: Sequence[Encoded],
    basis: Mapping[str, Float[Tensor, "rank parameter"]],
    max_tokens: int,
) -> Projections:
    """Return every example's coordinates in the basis, its loss and the norm of its gradient.

    Coordinates and squared norms are sums over blocks, accumulated while the backward pass is at
    each; results leave the device once, at the end.
    """
    device, rank = _device(model), len(next(iter(basis.values())))
    coordinates = torch.empty(len(examples), rank, device=device)
    norms, losses = torch.empty(2, len(examples), device=device)
    for indices, backpropagate in each_batch(model, examples, max_tokens):
        inner = torch.zeros(len(indices), rank, device=device)
        squares = torch.zeros(len(indices), device=device)

        def contract(
            name: str, gradient: Tensor, inner: Tensor = inner, squares: Tensor = squares
        ) -> None:
            flat = gradient.flatten(1).float()
            inner.addmm_(flat, basis[name].T)
            squares.add_(torch.linalg.vecdot(flat, flat))

        losses[indices] = backpropagate(contract)
        coordinates[indices] = inner
        norms[indices] = squares.sqrt()
    return Projections(coordinates.cpu(), losses.cpu(), norms.cpu())


def each_batch(
    model: nn.Module, examples: Sequence[Encoded], max_tokens: int
) -> Iterator[tuple[Int[Tensor, " batch"], Callable[[Consume], Float[Tensor, " batch"]]]]:
    """Yield each batch as the indices of its examples and the function that runs it."""
    device = _device(model)
    lengths = [int(np.flatnonzero(example.supervised)[-1]) for example in examples]
    with PerExampleGradients(model) as gradients:
        for indices in plan_batches(lengths, max_tokens):
            batch = Batch.of([examples[i] for i in indices], device)
            yield torch.from_numpy(indices).to(device), partial(gradients, batch)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

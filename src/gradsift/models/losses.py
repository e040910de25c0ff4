"""Logits where there is a label, and the loss of each label, in memory that is bounded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import masking_utils, modeling_flash_attention_utils

from gradsift.models.batches import Batch
from gradsift.models.thread_flag import ThreadFlag

_LOGITS_AT_ONCE = 1 << 25  # entries of one piece of the softmax, twice in float32: 256 MB


def label_logits(
    model: nn.Module, batch: Batch, on_hidden: Callable[[Tensor], object] = lambda hidden: None
) -> Float[Tensor, "label vocabulary"]:
    """Return the logits where there is a label; elsewhere none are formed.

    What enters the output head is trimmed, which keeps each architecture's own scaling and
    soft-capping; `on_hidden` is called with it before that.

    Raises:
        ModelError: If the output head is not fed (example, token, feature).
    """

    def trim(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        on_hidden(inputs[0])
        return (batch.at_labels(inputs[0]), *inputs[1:])

    head = getattr(model, "module", model).get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(trim)
    try:
        with nothing_packed():
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits.flatten(0, -2)


_alone = ThreadFlag()


def nothing_packed() -> AbstractContextManager[None]:
    """Answer for transformers whether several sequences share a row: in our batches none do.

    It would look into the positions of every batch, and with flash attention of every layer, and
    wait for the device each time. Other threads, where rows may be shared, get its own answers.
    """
    _stand_in()
    return _alone.raised()


@cache
def _stand_in() -> None:
    """Put both lookups behind the flag, once and for good; twice would do no harm."""
    find = masking_utils.find_packed_sequence_indices
    is_packed = modeling_flash_attention_utils._is_packed_sequence
    masking_utils.find_packed_sequence_indices = lambda position_ids: (
        None if _alone.up else find(position_ids)
    )
    modeling_flash_attention_utils._is_packed_sequence = lambda position_ids, batch_size: (
        False if _alone.up else is_packed(position_ids, batch_size)
    )


class _TokenLosses(torch.autograd.Function):
    """Negative log-likelihoods, their softmax in float32, in pieces, formed again on the way back.

    Autograd would keep the float32 softmax of the whole batch; this keeps the logits alone.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        pieces = zip(_pieces(logits), _pieces(labels, like=logits), strict=True)
        return torch.cat(
            [
                nn.functional.cross_entropy(piece.float(), label, reduction="none")
                for piece, label in pieces
            ]
        )

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        inner = torch.empty_like(logits)
        parts = (_pieces(tensor, like=logits) for tensor in (logits, inner, labels, outer[0]))
        for piece, into, label, scale in zip(*parts, strict=True):
            softmax = piece.softmax(-1, dtype=torch.float32)
            softmax[torch.arange(len(label), device=label.device), label] -= 1
            torch.mul(softmax, scale[:, None], out=into)
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

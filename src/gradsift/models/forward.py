"""One forward pass without gradients: losses, what is predicted right, pooled hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsift.data.encoding import Encoded
from gradsift.models.batches import (
    MAX_EXAMPLES,
    device_of,
    make_batches,
    padded,
    plan_batches,
    to_device,
)
from gradsift.models.losses import label_logits, token_losses


@dataclass(frozen=True)
class Outputs:
    """What a model makes of some examples, row by row, on its device.

    `losses`: mean negative log-likelihood of an example's supervised tokens, in nats.
    `num_correct`: how many of them are the most likely one. `hidden`: mean of the last hidden
    states over all its tokens, the i-th weighted by i, at length 1 (Ivison et al., 2025, arXiv
    2503.01807).
    """

    losses: Float[Tensor, " example"]
    num_correct: Int[Tensor, " example"]
    hidden: Float[Tensor, "example feature"]


@torch.no_grad()
def run_forward(model: nn.Module, examples: Sequence[Encoded], max_tokens: int) -> Outputs:
    """Return the outputs for the examples; hidden states are those that enter the output head."""
    device = device_of(model)
    lengths = np.array([len(example.input_ids) for example in examples])
    groups = plan_batches(padded(model, lengths), max_tokens, MAX_EXAMPLES)
    losses: list[Tensor] = []
    num_correct: list[Tensor] = []
    hidden: list[Tensor] = []
    with closing(make_batches(model, examples, groups, whole=True)) as batches:
        for group, batch in zip(groups, batches, strict=True):
            own = to_device(lengths[group], device)
            logits = label_logits(model, batch, partial(_keep_mean, own, hidden))
            losses.append(batch.by_example(token_losses(logits, batch.labels) * batch.weights))
            num_correct.append(batch.by_example((logits.argmax(-1) == batch.labels).long()))
    back = to_device(np.argsort(np.concatenate(groups)), device)
    found = (torch.cat(parts)[back] for parts in (losses, num_correct, hidden))
    return Outputs(*found)


def _keep_mean(
    lengths: Int[Tensor, " example"],
    pooled: list[Tensor],
    hidden: Float[Tensor, "example token feature"],
) -> None:
    """Keep the position-weighted mean of each example's hidden states."""
    positions = torch.arange(1, hidden.shape[1] + 1, device=lengths.device)
    weights = (positions * (positions <= lengths[:, None])).float()
    weights /= weights.sum(1, keepdim=True)
    mean = torch.einsum("etf,et->ef", hidden.float(), weights)
    pooled.append(nn.functional.normalize(mean))

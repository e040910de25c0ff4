"""One forward pass without gradients: losses, what is predicted right, pooled hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsift.batches import Batch, lay_out, plan_batches, to_device
from gradsift.data import Encoded
from gradsift.gradients import token_losses
from gradsift.passes import MOST_EXAMPLES


@dataclass(frozen=True)
class Outputs:
    """What a model makes of some examples, row by row, on its device.

    `losses`: mean negative log-likelihood of an example's supervised tokens, in nats.
    `num_correct`: how many of them are the most likely one. `hidden`: mean of the last hidden states over all its
    tokens, the i-th weighted by i, at length 1 (Ivison et al., 2025, arXiv 2503.01807).
    """

    losses: Float[Tensor, " example"]
    num_correct: Int[Tensor, " example"]
    hidden: Float[Tensor, "example feature"]


@torch.no_grad()
def run_forward(model: nn.Module, examples: Sequence[Encoded], max_tokens: int) -> Outputs:
    """Return the outputs for the examples; logits are formed where there is a label, only there.

    Hidden states are those that enter the output head.
    """
    device = next(model.parameters()).device
    groups = plan_batches([len(e.input_ids) for e in examples], max_tokens, MOST_EXAMPLES)
    head = model.get_output_embeddings()  # type: ignore[operator]
    losses = torch.empty(len(examples), device=device)
    num_correct = torch.empty(len(examples), dtype=torch.long, device=device)
    hidden: list[Tensor] = []
    for group, batch in zip(groups, lay_out(examples, groups, device, whole=True), strict=True):
        lengths = torch.tensor([len(examples[i].input_ids) for i in group], device=device)
        indices = to_device(group, device)
        tap = head.register_forward_pre_hook(partial(_pool, batch, lengths, hidden))
        try:
            logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, -2)
        finally:
            tap.remove()
        losses[indices] = _by_example(batch, token_losses(logits, batch.labels) * batch.weights)
        right = (logits.argmax(-1) == batch.labels).long()
        num_correct[indices] = _by_example(batch, right)
    order = to_device(torch.cat([torch.from_numpy(g) for g in groups]).numpy(), device)
    return Outputs(losses, num_correct, torch.cat(hidden)[torch.argsort(order)])


def _pool(
    batch: Batch,
    lengths: Int[Tensor, " example"],
    pooled: list[Tensor],
    head: nn.Module,
    inputs: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Keep the position-weighted mean of what enters the head, and let the labels' states pass."""
    entering = batch.at_labels(inputs[0])
    positions = torch.arange(1, inputs[0].shape[1] + 1, device=lengths.device)
    weights = (positions * (positions <= lengths[:, None])).float()
    weights /= weights.sum(1, keepdim=True)
    mean = torch.einsum("etf,et->ef", inputs[0].float(), weights)
    pooled.append(nn.functional.normalize(mean))
    return (entering, *inputs[1:])


def _by_example(batch: Batch, values: Tensor) -> Tensor:
    """Return the sum over each example's labels; one place each, so in no changing order."""
    table = torch.zeros(batch.input_ids.shape, dtype=values.dtype, device=values.device)
    table[batch.rows, batch.columns] = values
    return table.sum(1)

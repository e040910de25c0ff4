"""Per-example gradients of LoRA weights: one forward and one backward pass for a whole batch.

For `h = x Aᵀ` and `y = h Bᵀ`, the gradient of one example is a sum over its tokens,

    ∇A = Σ_t a'_t x_tᵀ        ∇B = Σ_t b'_t h_tᵀ

with a', b' the gradients that reach the outputs of A and B (Goodfellow, 2015, arXiv 1510.01799).
Both are at hand while the backward pass is at that layer, so each gradient is formed there in the
model's precision, given to the caller's function (what follows is float32 or better) and forgotten:
no weight gradient and no whole row is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.data.encoding import Encoded
from gradsift.errors import ModelError
from gradsift.models.batches import (
    MAX_EXAMPLES,
    Batch,
    device_of,
    lengths_of,
    make_batches,
    plan_batches,
    to_device,
)
from gradsift.models.fused import fused_elementwise
from gradsift.models.lora import LoraPair, lora_pairs
from gradsift.models.losses import label_logits, token_losses

Consume = Callable[[str, Float[Tensor, "example out in"]], None]
"""Takes one block's name and the gradients of all the batch's examples for it."""


_FLOAT16_SCALE = 256.0


def blocks(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every LoRA matrix, by name, in the order of the layers."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, pair in lora_pairs(model).items():
        shapes[f"{name}.A"] = (pair.a.out_features, pair.a.in_features)
        shapes[f"{name}.B"] = (pair.b.out_features, pair.b.in_features)
    return shapes


def gradient_scale(model: nn.Module) -> float:
    """Return the factor by which gradients are too large at first: 1, but in float16.

    Small ones would vanish there on their way back, so it is taken out of what is made of them.
    """
    half = next(iter(lora_pairs(model).values())).a.weight.dtype == torch.float16
    return _FLOAT16_SCALE if half else 1.0


class PerExampleGradients:
    """Hooks on a model's LoRA layers, attached while the context is open.

    Each call runs one batch, hands every block's gradients, times `gradient_scale`, to `consume`
    during the backward pass, and returns each example's loss: the mean negative log-likelihood of
    its supervised tokens.

    The model is frozen and in evaluation mode, padding is on the right and attention causal, so
    that no token of an example sees padding and none is masked.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the layers to attach hooks to.

        Raises:
            ModelError: If a layer's gradient cannot be measured exactly.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ModelError(
                "gradient checkpointing is on, every tap would fire twice; turn it off"
            )
        self._model = model
        self._pairs = lora_pairs(model)
        self._scale = gradient_scale(model)
        self._handles: list[Any] = []
        self._fused = ExitStack()
        self._seen: set[str] = set()
        self._batch: Batch | None = None
        self._consume: Consume = lambda name, gradient: None

    def __enter__(self) -> PerExampleGradients:
        """Attach the hooks."""
        self._fused.enter_context(fused_elementwise(self._model))
        pairs = self._pairs.items()
        self._handles = [hook for name, pair in pairs for hook in self._register_hooks(name, pair)]
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self._fused.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __call__(self, batch: Batch, consume: Consume) -> Float[Tensor, " example"]:
        """Return the losses of the batch, having given every block's gradients to `consume`."""
        assert self._handles, "use it as a context manager"
        self._batch, self._consume = batch, consume
        self._seen.clear()
        with torch.enable_grad():
            nll = token_losses(label_logits(self._model, batch), batch.labels) * batch.weights
            (nll.sum() * self._scale).backward()
        return batch.by_example(nll.detach())

    def _register_hooks(self, name: str, pair: LoraPair) -> Iterator[Any]:
        for suffix, module in zip("AB", pair, strict=True):
            yield module.register_forward_hook(partial(self._forward_hook, f"{name}.{suffix}"))

    def _forward_hook(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        layer_input = self._by_example(name, inputs[0].detach())
        if name in self._seen:
            raise ModelError(f"cannot measure {name}: it is used more than once in a forward pass")
        self._seen.add(name)
        if not output.requires_grad:  # the first adapted layer: autograd begins here
            output = output.detach().requires_grad_()

        def backward_hook(grad_output: Tensor) -> None:
            each = self._by_example(name, grad_output)
            gradient = torch.bmm(each.transpose(1, 2), layer_input.to(each.dtype))
            self._consume(name, gradient)

        output.register_hook(backward_hook)
        return output

    def _by_example(self, name: str, tensor: Tensor) -> Float[Tensor, "example token feature"]:
        """Return what passes a layer as (example, token, feature); some models fold tokens up."""
        num_examples, num_tokens = self._batch.input_ids.shape  # type: ignore[union-attr]
        features, others = tensor.shape[-1], tensor.shape[:-1]
        if others.numel() != num_examples * num_tokens or (
            len(others) > 1 and others[0] != num_examples
        ):
            raise ModelError(
                f"cannot measure {name}: its input has shape {tuple(tensor.shape)}, expected all "
                "tokens of the batch in order, (example, token, feature)"
            )
        return tensor.reshape(num_examples, num_tokens, features)


def gradient_rows(
    model: nn.Module, examples: Sequence[Encoded], max_tokens: int
) -> dict[str, Float[Tensor, "example _"]]:
    """Return every example's gradient in float32, block by block, each flattened."""
    device = device_of(model)
    rows = {
        name: torch.empty(len(examples), prod(shape), device=device)
        for name, shape in blocks(model).items()
    }
    scale = gradient_scale(model)
    groups = plan_batches(lengths_of(examples), max_tokens, MAX_EXAMPLES)
    for group, backpropagate in each_batch(model, examples, groups):
        indices = to_device(group, device)

        def take(name: str, gradient: Tensor, indices: Tensor = indices) -> None:
            rows[name][indices] = gradient.flatten(1).float() / scale

        backpropagate(take)
    return rows


def each_batch(
    model: nn.Module, examples: Sequence[Encoded], groups: Sequence[np.ndarray]
) -> Iterator[tuple[np.ndarray, Callable[[Consume], Float[Tensor, " batch"]]]]:
    """Yield each group with the function that runs its batch."""
    batches = make_batches(examples, groups, device_of(model))
    with PerExampleGradients(model) as gradients:
        for group, batch in zip(groups, batches, strict=True):
            yield group, partial(gradients, batch)

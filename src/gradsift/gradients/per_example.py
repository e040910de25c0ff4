"""Per-example gradients of LoRA weights: one forward and one backward pass for a whole batch.

The gradient of one example is a sum over its tokens (Goodfellow, 2015, arXiv 1510.01799), formed
while the backward pass is at that layer (`adapted_layers.py`), in the model's precision, given to
the caller's function (what follows is float32 or better) and forgotten: no weight gradient and no
whole row is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.data.encoding import Encoded
from gradsift.errors import ModelError
from gradsift.gradients.adapted_layers import AdaptedLayer, Consume, SharedInput
from gradsift.models.batches import Batch, device_of, group_examples, make_batches, to_device
from gradsift.models.fused import fused_elementwise
from gradsift.models.last_layer import labelled_alone, modules_after_attention
from gradsift.models.lora import adapted_layers, lora_pairs
from gradsift.models.losses import label_logits, token_losses

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
    """A model whose LoRA layers hand out gradients, as long as the context is open.

    Each call runs one batch, hands every block's gradients, times `gradient_scale`, to `consume`
    during the backward pass, and returns each example's loss: the mean negative log-likelihood of
    its supervised tokens.

    The model is frozen and in evaluation mode, padding is on the right and attention causal, so
    that no token of an example sees padding and none is masked.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the layers.

        Raises:
            ModelError: If a layer's gradient cannot be measured exactly.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ModelError(
                "gradient checkpointing is on, every layer would be run twice; turn it off"
            )
        self._model = model
        self._layers = adapted_layers(model)
        self._scale = gradient_scale(model)
        self._open: ExitStack | None = None
        self._trimmed: Mapping[str, nn.Module] = {}
        self._inside_trimmed: set[str] = set()
        self._batch: Batch | None = None
        self._consume: Consume = lambda name, gradient: None
        self._seen: set[str] = set()
        self._last: tuple[Tensor, Tensor, SharedInput] | None = None

    def __enter__(self) -> PerExampleGradients:
        """Take over the forward passes of the adapted layers."""
        self._trimmed = modules_after_attention(self._model)
        self._inside_trimmed = {
            name
            for name in self._layers
            if any(f"{name}.".startswith(f"{module}.") for module in self._trimmed)
        }
        with ExitStack() as stack:
            stack.enter_context(fused_elementwise(self._model))
            for name, layer in self._layers.items():
                stack.enter_context(
                    _forward_of(layer, partial(self._forward, AdaptedLayer(name, layer)))
                )
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        assert self._open
        self._open.close()
        self._open = self._batch = self._last = None

    def __call__(self, batch: Batch, consume: Consume) -> Float[Tensor, " example"]:
        """Return the losses of the batch, having given every block's gradients to `consume`."""
        assert self._open, "use it as a context manager"
        self._batch, self._consume = batch, consume
        self._seen.clear()
        try:
            with torch.enable_grad(), labelled_alone(self._trimmed, batch):
                logits = label_logits(self._model, batch)
                self._last = None
                nll = token_losses(logits, batch.labels) * batch.weights
                (nll.sum() * self._scale).backward()
        finally:
            self._last = self._batch = None  # else all that was kept for the way back stays
        return batch.by_example(nll.detach())

    def _forward(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        if layer.name in self._seen:
            raise ModelError(
                f"cannot measure {layer.name}: it is used more than once in a forward pass"
            )
        self._seen.add(layer.name)
        self._check_tokens(layer.name, x)
        opened, shared = self._share(layer, x)
        base_output = None
        if layer.weight is None:
            base_output = layer.base(opened if x.requires_grad else x)
        return shared.run(layer, opened, base_output)

    def _share(self, layer: AdaptedLayer, x: Tensor) -> tuple[Tensor, SharedInput]:
        """Return x, opened for this layer and those that read the same one right after it."""
        if self._last and self._last[0] is x and self._last[2].layers[-1].merged == layer.merged:
            return self._last[1:]
        shared = SharedInput(self._by_example, self._consume)
        opened = shared.begin(x)
        self._last = x, opened, shared
        return opened, shared

    def _check_tokens(self, name: str, x: Tensor) -> None:
        """Make sure that a layer is given all tokens in order, or those with a label."""
        assert self._batch
        num_examples, num_tokens = self._batch.input_ids.shape
        trimmed, others = name in self._inside_trimmed, x.shape[:-1]
        expected = len(self._batch.labels) if trimmed else num_examples * num_tokens
        if others.numel() != expected or (
            not trimmed and len(others) > 1 and others[0] != num_examples
        ):
            raise ModelError(
                f"cannot measure {name}: its input has shape {tuple(x.shape)}, expected all "
                "tokens of the batch in order, (example, token, feature)"
            )

    def _by_example(self, name: str, tensor: Tensor) -> Float[Tensor, "example token feature"]:
        """Return what passes a layer as (example, token, feature); some models fold tokens up."""
        assert self._batch
        if name in self._inside_trimmed:
            return self._batch.spread(tensor.flatten(0, -2))
        return tensor.reshape(*self._batch.input_ids.shape, -1)


@contextmanager
def _forward_of(layer: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have a layer run another forward pass for a while."""
    if "forward" in vars(layer):
        raise ModelError(
            f"the forward pass of a {type(layer).__name__} has been replaced already, by another "
            "pass over this model that has not ended or by another library; load the model anew"
        )
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def gradient_rows(
    model: nn.Module, examples: Sequence[Encoded], max_tokens: int
) -> dict[str, Float[Tensor, "example _"]]:
    """Return every example's gradient in float32, block by block, each flattened."""
    device = device_of(model)
    rows = {
        name: torch.zeros(len(examples), prod(shape), device=device)  # also of what is not used
        for name, shape in blocks(model).items()
    }
    scale = gradient_scale(model)
    groups = group_examples(model, examples, max_tokens)
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
    coming = make_batches(model, examples, groups)
    with closing(coming) as batches, PerExampleGradients(model) as gradients:  # type: ignore[arg-type]
        for group, batch in zip(groups, batches, strict=True):
            yield group, partial(gradients, batch)

"""Adapted layers that read the same input, as one step of the backward pass.

For `y = W x + s B h` with `h = A x`, where g is the gradient that reaches y and `a = s Bᵀ g`,

    ∇A = Σ_t a_t x_tᵀ        ∇B = Σ_t g_t (s h_t)ᵀ        x receives Wᵀ g + Aᵀ a

so that x and g are all that is needed: nothing else of a layer is kept, and h is formed again on
the way back. Attention's q, k and v read the same x. Their gradients are gathered first, and their
matrices A, stacked, make one product each for h, for ∇A and for what x receives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsift.errors import ModelError
from gradsift.models.lora import LoraPair, scaling

ByExample = Callable[[str, Tensor], Float[Tensor, "example token feature"]]
"""Lays out what passes the named layer, whatever its shape there."""
Consume = Callable[[str, Float[Tensor, "example out in"]], None]
"""Takes one block's name and the gradients of all the batch's examples for it."""


class AdaptedLayer:
    """What the two passes through an adapted layer need.

    `weight` and `bias` are those of a base layer that is a plain matrix; any other (quantized, for
    one) multiplies by itself, and `weight` is None. In float32 on the CPU the adapter is `merged`:
    `weight` is W + s B A, a copy, which takes a product less each way.
    """

    def __init__(self, name: str, layer: LoraLayer) -> None:
        """Read the layer, and merge in float32 on the CPU.

        Raises:
            ModelError: If the adapter has another precision than a plain base layer.
        """
        pair = LoraPair.of(layer)
        self.name, self.a, self.b = name, pair.a.weight, pair.b.weight
        self.scaling, self.base = scaling(layer), layer.get_base_layer()
        self.weight: Float[Tensor, "out in"] | None = None
        self.bias: Float[Tensor, " out"] | None = None
        self.merged = False
        if _is_plain(self.base):
            weight, self.bias = self.base.get_parameter("weight"), self.base.bias  # type: ignore[assignment]
            weight = weight.T if isinstance(self.base, Conv1D) else weight
            if weight.dtype != self.a.dtype:
                raise ModelError(
                    f"cannot measure {name}: its adapter is {self.a.dtype}, its base layer "
                    f"{weight.dtype}; cast one of them"
                )
            self.merged = weight.device.type == "cpu" and weight.dtype == torch.float32
            if self.merged:
                weight = torch.addmm(weight, self.b, self.a, alpha=self.scaling)
            self.weight = weight

    def multiply(self, x: Tensor, base_output: Tensor | None) -> Tensor:
        """Return y, given what the base layer has made of x where that is not a plain matrix."""
        rows = x.flatten(0, -2)
        if self.weight is not None:
            y = F.linear(rows, self.weight, self.bias)
            if not self.merged:
                y.addmm_(rows @ self.a.T, self.b.T, alpha=self.scaling)
        else:  # kept as it came: the base layer's own backward pass may need it
            assert base_output is not None
            given = base_output.flatten(0, -2)
            h = rows.to(self.a.dtype) @ self.a.T
            y = torch.addmm(given.to(h.dtype), h, self.b.T, alpha=self.scaling).to(given.dtype)
        # no view: what follows may change it in place
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def _is_plain(base: nn.Module) -> bool:
    """Return whether a base layer only multiplies by its matrix and adds its bias."""
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
    return type(base) in {nn.Linear, Conv1D} and not hooked


class SharedInput:
    """One input in one forward pass, and the gradients that have reached its layers' outputs."""

    def __init__(self, by_example: ByExample, consume: Consume) -> None:
        """Take how to lay out what passes the layers, and where gradients go."""
        self._by_example, self._consume = by_example, consume
        self.layers: list[AdaptedLayer] = []
        self._grad_outputs: dict[str, Tensor] = {}

    def begin(self, x: Tensor) -> Tensor:
        """Return x, such that its backward pass comes after that of all layers that read it."""
        # autograd may begin here, at the first adapted layer: the second argument makes it
        return _Input.apply(x, torch.zeros((), requires_grad=True), self)  # type: ignore[return-value]

    def run(self, layer: AdaptedLayer, x: Tensor, base_output: Tensor | None) -> Tensor:
        """Return the layer's output for x, which `begin` returned."""
        self.layers.append(layer)
        return _Output.apply(x, base_output, layer, self)  # type: ignore[return-value]

    def keep_grad_output(self, layer: AdaptedLayer, grad_output: Tensor) -> None:
        """Keep the gradient that has reached a layer's output."""
        self._grad_outputs[layer.name] = grad_output

    def backward(self, x: Tensor, wanted: bool) -> Tensor | None:
        """Form and hand over the gradients; return what x receives of these layers if `wanted`."""
        layers = [layer for layer in self.layers if layer.name in self._grad_outputs]
        if not layers:  # none of their outputs was used
            return None
        shape, x = x.shape, x.flatten(0, -2).to(layers[0].a.dtype)
        outer = [self._grad_outputs.pop(layer.name).flatten(0, -2).to(x.dtype) for layer in layers]
        unused = x.new_empty(())
        inner = [
            torch.addmm(unused, g, layer.b, beta=0, alpha=layer.scaling)
            for layer, g in zip(layers, outer, strict=True)
        ]
        down, a = (_join([layer.a for layer in layers], 0), _join(inner, 1))
        self._hand_over(layers, x, outer, a, down)
        if not wanted:
            return None
        total = None if layers[0].merged else a @ down
        for layer, g in zip(layers, outer, strict=True):
            if layer.weight is not None:
                total = g @ layer.weight if total is None else total.addmm_(g, layer.weight)
        assert total is not None
        return total.view(shape)

    def _hand_over(
        self,
        layers: Sequence[AdaptedLayer],
        x: Tensor,
        outer: Sequence[Tensor],
        a: Tensor,
        down: Tensor,
    ) -> None:
        name, ranks = layers[0].name, [len(layer.a) for layer in layers]
        x, h, a = (self._by_example(name, values) for values in (x, x @ down.T, a))
        for layer, block in zip(layers, (a.mT @ x).split(ranks, 1), strict=True):
            self._consume(f"{layer.name}.A", block)
        for layer, own, g in zip(layers, h.split(ranks, 2), outer, strict=True):
            scaled = own * layer.scaling
            self._consume(f"{layer.name}.B", self._by_example(name, g).mT @ scaled)


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat([*tensors], dim) if len(tensors) > 1 else tensors[0]


class _Input(torch.autograd.Function):
    """The identity; its backward pass is that of all layers that read x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, shared: SharedInput) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.shared = shared
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (x,), wanted = ctx.saved_tensors, ctx.needs_input_grad[0]
        found = ctx.shared.backward(x, wanted)
        received = [g for g in (found, grads[0]) if g is not None and wanted]
        return sum(received[1:], start=received[0]) if received else None, None, None


class _Output(torch.autograd.Function):
    """What a layer returns; its backward pass only tells `shared` what has come."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_output: Tensor | None, layer: AdaptedLayer, shared: SharedInput
    ) -> Tensor:
        ctx.layer, ctx.shared = layer, shared
        return layer.multiply(x, base_output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None]:
        ctx.shared.keep_grad_output(ctx.layer, grads[0])
        return None, grads[0] if ctx.needs_input_grad[1] else None, None, None

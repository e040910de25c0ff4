"""Norms and rotary embeddings of a frozen model in fewer passes over memory.

transformers writes them as chains of small operators, each of which reads and writes every
activation; here they are a function each, with a backward pass for activations alone:

    norm    y = w · x / √(mean x² + ε)        kept: x and a number per row
    rotary  y = x · cos + (-x₂, x₁) · sin     written in place, no half of x is copied

Nothing goes by a model's name. A module or function is replaced where it returns to the bit, for
small random inputs, what the formula in its usual words returns; any other stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradsift.models.thread_flag import ThreadFlag

_ROTARY = "apply_rotary_pos_emb"  # the function's name in each family's file of transformers


class NormLaw(NamedTuple):
    """How a norm rounds: what is added to its weight, and whether it casts before it multiplies."""

    shift: float
    cast_first: bool


NORM_LAWS = (NormLaw(0, True), NormLaw(0, False), NormLaw(1, False))  # Llama's, OLMo 2's, Gemma's


@contextmanager
def fused_elementwise(model: nn.Module) -> Iterator[None]:
    """Replace what is recognised in a frozen model while the context is open, on this thread.

    Gradients are formed for activations alone, once: weights of norms get none, and the backward
    pass has no derivative of its own.
    """
    forwards = dict(_forwards(model))
    for name in sorted({type(module).__module__ for module in model.modules()}):
        if is_rotary(getattr(sys.modules[name], _ROTARY, None)):
            _stand_in(sys.modules[name])
    try:
        for module, forward in forwards.items():
            module.forward = forward
        with _rotating.raised():
            yield
    finally:
        for module in forwards:
            del module.forward


def _forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    for module in model.modules():
        if "forward" in vars(module):  # someone else's
            continue
        if module not in _found:
            _found[module] = norm_law(module)
        if law := _found[module]:
            weight: Any = module.weight
            weight = weight.detach().float() + law.shift if law.shift else weight.detach()
            yield module, partial(_norm, module, law, weight)


_found: WeakKeyDictionary[nn.Module, NormLaw | None] = WeakKeyDictionary()  # by `_forwards`


def norm_law(module: nn.Module) -> NormLaw | None:
    """Return the law of a root mean square norm, or nothing if it is none."""
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.pop("weight", None)
    if parameters or [*module.buffers(), *module.children()]:
        return None
    if _epsilon(module) is None or weight is None or weight.dim() != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, len(weight), generator=generator)
    x[1] *= _epsilon(module) ** 0.5  # where epsilon counts
    x, scale = x.bfloat16(), torch.randn(len(weight), generator=generator).bfloat16()
    found = _call_with_weights(module, x, _parameters={"weight": nn.Parameter(scale, False)})
    laws = (law for law in NORM_LAWS if _same(found, _plain_norm(x, scale, module, law)))
    return next(laws, None)


def _plain_norm(x: Tensor, weight: Tensor, module: nn.Module, law: NormLaw) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _epsilon(module))
    if law.cast_first:
        return weight * wide.to(x.dtype)
    return (wide * (law.shift + weight.float())).to(x.dtype)


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _call_with_weights(module: nn.Module, x: Tensor, **changes: Any) -> object:
    """Return what the module's class computes with other weights, or nothing if it cannot."""
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    twin = copy.copy(module)
    vars(twin).update(changes)
    try:
        return type(module).forward(twin, x)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _same(found: object, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.dtype != expected.dtype:
        return False
    return torch.equal(found, expected)


def _norm(module: nn.Module, law: NormLaw, weight: Tensor, x: Tensor) -> Tensor:
    """Return the norm; `weight` is what is multiplied by."""
    epsilon = _epsilon(module)
    if x.dtype != module.weight.dtype:  # a norm in float32 in a bfloat16 model
        return type(module).forward(module, x)
    if not _has_kernel(x):
        return _Norm.apply(x, weight, epsilon, law.cast_first)  # type: ignore[return-value]
    if law.cast_first:
        return F.rms_norm(x, weight.shape, None, epsilon) * weight
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, epsilon).to(x.dtype)


def _has_kernel(x: Tensor) -> bool:
    """Return whether PyTorch computes a norm in one kernel, and its gradient in another."""
    return x.device.type != "cpu"


class _Norm(torch.autograd.Function):
    """The norm on a CPU, where PyTorch has no kernel for it; in float32 inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, cast_first: bool) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.cast_first = cast_first
        normed = wide * scale
        if cast_first:
            return normed.to(x.dtype).mul_(weight)
        return normed.mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        wide = x.float()
        inner = (outer * weight).float() if ctx.cast_first else outer.float() * weight
        along = (inner * wide).sum(-1, keepdim=True)
        along.mul_(scale.square()).div_(-x.shape[-1])
        return inner.addcmul_(wide, along).mul_(scale).to(x.dtype), None, None, None


_rotating = ThreadFlag()


@cache
def _stand_in(family: ModuleType) -> None:
    """Put the rotation of a family's file behind the flag, once and for good."""
    plain = getattr(family, _ROTARY)

    def rotate(*given: Any, **settings: Any) -> Any:
        if not _rotating.up or settings or len(given) != 4:
            return plain(*given, **settings)
        query, key, cos, sin = given
        if cos.shape[-1] != query.shape[-1] or cos.dtype != query.dtype:
            return plain(query, key, cos, sin)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)

    setattr(family, _ROTARY, rotate)


@cache
def is_rotary(rotate: Callable[..., Any] | None) -> bool:
    """Return whether a function turns the first half of queries and keys against the second."""
    if rotate is None:
        return False
    generator = torch.Generator().manual_seed(0)
    # in bfloat16, where one that goes through float32 returns other bits
    query, key = torch.randn(2, 2, 3, 5, 8, generator=generator).bfloat16()
    cos, sin = torch.randn(2, 2, 5, 8, generator=generator).bfloat16()
    expected = []
    for x in (query, key):
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        expected.append(x * cos[:, None] + turned * sin[:, None])
    try:
        found = rotate(query, key, cos, sin)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, tuple) and len(found) == 2 and all(map(_same, found, expected))


class _Rotary(torch.autograd.Function):
    """Pairs of features turned by an angle; the way back turns them by the transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (low, high) = x.chunk(2, -1), sin.chunk(2, -1)
        turned = x * cos
        into_first, into_second = turned.chunk(2, -1)
        into_first.addcmul_(second, low, value=-1)
        into_second.addcmul_(first, high)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        (first, second), (low, high) = outer.chunk(2, -1), sin.chunk(2, -1)
        back = outer * cos
        into_first, into_second = back.chunk(2, -1)
        into_first.addcmul_(second, high)
        into_second.addcmul_(first, low, value=-1)
        return back, None, None

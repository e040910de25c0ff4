"""Which kernels a GPU takes while batches run, and how exactly it multiplies float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def precision_of(model: nn.Module) -> str:
    """Return the precision in which a model computes: that of its weights, or `tf32`."""
    return "tf32" if _in_tf32(model) else str(model.dtype).removeprefix("torch.")


def multiply_in_tf32(model: nn.Module) -> None:
    """Have a float32 model's matrix products round their factors to TF32 while batches run."""
    model.tf32 = True  # type: ignore[assignment]


def _in_tf32(model: nn.Module) -> bool:
    return getattr(getattr(model, "module", model), "tf32", False)  # of DDP's model the one within


@contextmanager
def kernels_for_batches(model: nn.Module) -> Iterator[None]:
    """Let attention and matrix products of a GPU be those for this model's batches, for a while.

    Attention is never cuDNN's, which PyTorch prefers on Hopper and Blackwell: it builds a plan for
    every number of examples and tokens, forward and backward, and a pass has a hundred of them.
    Flash attention has none. Matrix products of float32 are that, or TF32 where the model asks for
    it, whatever the process has set. A CPU has but float32's to choose.
    """
    cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    products = cuda.matmul, mkldnn.matmul  # type: ignore[attr-defined]
    attention, precisions = cuda.cudnn_sdp_enabled(), [each.fp32_precision for each in products]
    general = "highest"
    try:
        cuda.enable_cudnn_sdp(False)
        for each in products:
            each.fp32_precision = "ieee"  # else `general` cannot be read where they differ from it
        general = torch.get_float32_matmul_precision()
        # the older of PyTorch's two ways to say it: after the newer one alone, readers of the
        # older raise an error
        torch.set_float32_matmul_precision("high" if _in_tf32(model) else "highest")
        yield
    finally:
        cuda.enable_cudnn_sdp(attention)
        torch.set_float32_matmul_precision(general)
        for each, precision in zip(products, precisions, strict=True):
            each.fp32_precision = precision

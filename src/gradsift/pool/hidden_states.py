"""What is measured by one forward pass, for methods that need no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradsift.data.encoding import Encoded
from gradsift.pool.examples import Measure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gradsift.models.cache import ModelCache


def make_forward_measure(models: ModelCache) -> tuple[Measure, torch.device]:
    """Return what measures losses and pooled hidden states, and its device."""
    from gradsift.models.forward import run_forward

    model = models.base()

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        found = run_forward(model, examples, max_tokens)
        return {"loss": found.losses, "hidden": found.hidden.half()}

    return measure, model.device


def make_loss_measure(models: ModelCache, adapter: Path) -> tuple[Measure, torch.device]:
    """Return what measures losses alone, with a stored adapter, and its device."""
    from gradsift.models.forward import run_forward

    model = models.with_adapter(adapter)

    def measure(examples: Sequence[Encoded], max_tokens: int) -> dict[str, Tensor]:
        return {"loss": run_forward(model, examples, max_tokens).losses}

    return measure, model.device

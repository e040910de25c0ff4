"""Measuring some examples in one go, and making sure that what is found is finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.errors import NumericsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Measure = Callable[[Sequence[Encoded], int], "Mapping[str, Tensor]"]
"""`measure(examples, max_tokens)` returns the tensors to store by name, a row per example."""
MeasureFactory = Callable[[], "tuple[Measure, torch.device]"]
"""Loads the model and returns (measure, device); called in the process that is to measure."""


def measure_examples(
    encoded: EncodedSet, rows: np.ndarray, factory: MeasureFactory, engine: EngineConfig
) -> dict[str, np.ndarray]:
    """Return what the measure finds of some examples, row by row, in batches that fit."""
    from gradsift.models.batch_size import start_tokens, within_memory
    from gradsift.models.batches import lengths_of

    measure, device = factory()
    examples = encoded.examples(rows)
    work = partial(measure, examples)
    found, _ = within_memory(work, start_tokens(engine, device), lengths_of(examples))
    return {name: np.ascontiguousarray(values.cpu()) for name, values in found.items()}


def check_finite(
    tensors: Mapping[str, np.ndarray], whose: str, encoded: EncodedSet, start: int = 0
) -> None:
    """Check that all values are finite; row 0 is example `start` of the set.

    Raises:
        NumericsError: Naming the first example of which something is not.
    """
    for name, values in tensors.items():
        broken = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(broken):
            what = f"{name.partition('/')[0].replace('_', ' ')} {whose}"
            raise not_finite(what, encoded, start + broken)


def not_finite(what: str, encoded: EncodedSet, rows: np.ndarray) -> NumericsError:
    """Return the error that names the first of the rows of which something is not finite."""
    where = encoded.take(rows[:1], ["id", "file", "line"]).to_pylist()[0]
    return NumericsError(
        f"the {what} is not finite for {len(rows)} examples, the first being {where['id']!r} "
        f"({where['file']}:{where['line']}); is the model or its adapter broken? Try "
        "model.dtype=float32"
    )

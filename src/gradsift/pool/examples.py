"""Measuring some examples in one go, and making sure that what is found is finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.errors import NumericsError
from gradsift.methods.job import Job
from gradsift.runs.atomic import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Measure = Callable[[Sequence[Encoded], int], "Mapping[str, Tensor]"]
"""What to store of some examples, row by row and by name, given the most tokens per batch."""


Prepare = Callable[[], "tuple[Measure, torch.device]"]
"""Gives the measure and where it works; called in the process that is to measure."""


def measure_target(job: Job, name: str, path: Path, prepare: Prepare) -> None:
    """Store what the measure finds of a target's examples, row by row, in one file.

    Raises:
        NumericsError: Naming the first example of which something is not finite.
    """
    target = job.targets[name]
    tensors = measure_examples(job, target, np.arange(len(target)), prepare)
    check_finite(tensors, f"of the target {name!r}", target)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def measure_examples(
    job: Job, encoded: EncodedSet, rows: np.ndarray, prepare: Prepare
) -> dict[str, np.ndarray]:
    """Return what the measure finds of some examples, row by row, in batches that fit."""
    return job.call(partial(_measure_examples, encoded, rows, prepare, job.config.engine))


def _measure_examples(
    encoded: EncodedSet, rows: np.ndarray, prepare: Prepare, engine: EngineConfig
) -> dict[str, np.ndarray]:
    from gradsift.gradients.batch_size import start_tokens, within_memory
    from gradsift.models.batches import lengths_of

    measure, device = prepare()
    examples = encoded.examples(rows)
    work = partial(measure, examples)
    found, _ = within_memory(work, start_tokens(engine, device), lengths_of(examples))
    return {name: np.ascontiguousarray(values.cpu()) for name, values in found.items()}


def check_finite(
    tensors: Mapping[str, np.ndarray], whose: str, encoded: EncodedSet, start: int = 0
) -> None:
    """Make sure that all is finite that was found of some examples, the first being `start`.

    Raises:
        NumericsError: Naming the first example of which something is not.
    """
    for name, values in tensors.items():
        broken = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(broken):
            told = f"{name.partition('/')[0].replace('_', ' ')} {whose}"
            raise not_finite(told, encoded, start + broken)


def not_finite(what: str, encoded: EncodedSet, rows: np.ndarray) -> NumericsError:
    """Return the error that names the first of the rows of which something is not finite."""
    where = encoded.take(rows[:1], ["id", "file", "line"]).to_pylist()[0]
    return NumericsError(
        f"the {what} is not finite for {len(rows)} examples, the first being {where['id']!r} "
        f"({where['file']}:{where['line']}); is the model or its adapter broken? Try "
        "model.dtype=float32"
    )

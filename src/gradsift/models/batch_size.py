"""Tokens per batch: the most that fit, and fewer when they did not.

On a GPU they are looked for upwards, from few: doubled as long as the worst batch fits, then
bisected. Whatever runs out of memory all the same is done again in batches of half the size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from jaxtyping import Int

from gradsift.config import EngineConfig
from gradsift.data.encoding import Encoded
from gradsift.errors import ModelError
from gradsift.models.batches import MAX_EXAMPLES

logger = logging.getLogger(__name__)

T = TypeVar("T")
RunBatches = Callable[[Sequence[Encoded], int], object]
"""Measures some examples, given the most tokens per batch."""

FEW_TOKENS = 2048
"""Tokens of a small batch. More do not help a CPU (docs/performance.md); a search begins here."""
_MOST_TOKENS = 32768  # on a GPU
_STEPS = 8  # what is found misses what fits by less than one part in so many
_MORE = 16  # one part in so many is tried on top: memory that is in pieces holds less
_ADVICE = "lower data.max_length, lora.rank or engine.memory, or quantize the model"
# of CUDA, its allocator and its matrix library, and of the CPU
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def start_tokens(engine: EngineConfig, device: torch.device) -> int:
    """Return the tokens per batch to begin with, before anything is known of what fits."""
    if engine.batch_tokens != "auto":
        return engine.batch_tokens
    return FEW_TOKENS if device.type == "cpu" else _MOST_TOKENS


def find_batch_tokens(
    measure: RunBatches,
    lengths: Int[np.ndarray, " example"],
    engine: EngineConfig,
    device: torch.device,
) -> int:
    """Return the tokens per batch of a pool pass: as set, or the most that the device holds."""
    max_tokens = start_tokens(engine, device)
    if engine.batch_tokens == "auto" and device.type != "cpu":
        max_tokens = probe(measure, lengths, max_tokens)
    logger.info("batches of up to %d tokens", max_tokens)
    return max_tokens


def probe(measure: RunBatches, lengths: Int[np.ndarray, " example"], most: int) -> int:
    """Return the most tokens per batch, up to `most`, with which the worst batch fits."""
    return most_tokens(partial(run_worst, measure, lengths), lengths, most)


def run_worst(measure: RunBatches, lengths: Int[np.ndarray, " example"], tokens: int) -> None:
    """Measure the worst batches that examples of these lengths can make.

    The worst in activations and logits is one of the longest examples with a label at every token,
    the worst in gradients one of as many examples as a batch may have.
    """
    longest = int(lengths.max())
    for length in (longest, min(longest, max(1, tokens // MAX_EXAMPLES))):
        measure(worst_examples(length, min(max(1, tokens // length), MAX_EXAMPLES)), tokens)


def most_tokens(
    run: Callable[[int], object],
    lengths: Int[np.ndarray, " example"],
    most: int,
    relieve: Callable[[], str] = lambda: _ADVICE,
) -> int:
    """Return the most tokens, up to `most`, with which `run` fits, to one part in eight.

    Doubled from few as long as they fit; then the gap to those that do not is halved three times.
    Each is tried with a sixteenth more, since what fits once may not fit later.

    Raises:
        ModelError: As `within_memory`, where few do not fit.
    """

    def run_more(tokens: int) -> None:
        run(tokens + tokens // _MORE)

    first = min(most, max(FEW_TOKENS, int(lengths.max())))
    _, found = within_memory(run_more, first, lengths, relieve, logging.INFO)
    too_many = 2 * found if found < first else 0  # not known yet
    while found < most and not too_many:
        tokens = min(2 * found, most)
        found, too_many = (tokens, 0) if fits(run_more, tokens) else (found, tokens)
    step = max(1, found // _STEPS)
    while too_many - found > step:
        tokens = (found + too_many) // 2
        found, too_many = (tokens, too_many) if fits(run_more, tokens) else (found, tokens)
    return found


def fits(run: Callable[[int], object], tokens: int) -> bool:
    """Return whether memory suffices for so many tokens; what a failure took is free again."""
    try:
        run(tokens)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    clear_device_cache(garbage_collection=True)  # here, where the error holds no tensor any more
    return False


def worst_examples(length: int, count: int) -> list[Encoded]:
    """Return so many examples of which `length` tokens enter the model, a label after each."""
    return [Encoded(np.zeros(length + 1, np.int32), np.arange(length + 1) > 0)] * count


def within_memory(
    work: Callable[[int], T],
    max_tokens: int,
    lengths: Int[np.ndarray, " example"],
    relieve: Callable[[], str] = lambda: _ADVICE,
    level: int = logging.WARNING,
) -> tuple[T, int]:
    """Return what `work(max_tokens)` gives, and the tokens per batch with which it did.

    When memory runs out, all that `work` does is done again with half the tokens per batch, down
    to batches of one example each. Then `relieve` finds another way to take less, and all begins
    anew, or says what the user can change. `level`: of the log, lower where this is a search.

    Raises:
        ModelError: If not even they fit.
    """
    first = max_tokens
    while True:
        try:
            return work(max_tokens), max_tokens
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            cause = str(error).partition("\n")[0]
        clear_device_cache(garbage_collection=True)
        if max_tokens >= 2 * lengths.min():
            max_tokens //= 2
            logger.log(level, "out of memory; going on with batches of %d tokens", max_tokens)
        elif advice := relieve():
            raise ModelError(
                f"out of memory with one example per batch, the longest of {lengths.max()} tokens; "
                f"{advice} ({cause})"
            )
        else:
            max_tokens = first


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether this is how a device, its allocator or its library says that memory ran out.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    """
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)

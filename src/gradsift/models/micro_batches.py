"""Forward passes of a training that fit the memory: their tokens, and activations kept or not.

The examples of an optimizer step go through the model in micro-batches whose gradients add up. On
a GPU the most that fit are looked for before the first step, and remembered for later trainings of
the process; whenever memory runs out, tokens are halved as in a pass over the pool
(`batch_size.py`). The last resort is gradient checkpointing: a layer's activations are computed
again on the way back (Chen et al., 2016, arXiv 1604.06174).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradsift.errors import ModelError
from gradsift.models.batch_size import (
    RunBatches,
    is_out_of_memory,
    most_tokens,
    within_memory,
    worst_examples,
)
from gradsift.models.batches import device_of
from gradsift.models.losses import nothing_packed

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CPU_TOKENS = 1024  # more are slower (docs/performance.md)
_GPU_TOKENS = 8 * 2048  # at most


class _Fitted(NamedTuple):
    """What fitted in a training whose longest example had so many tokens.

    `last_resort`: checkpointing, which nobody had asked for.
    """

    longest: int
    max_tokens: int
    last_resort: bool

    def serves(self, longest: int) -> bool:
        """Return whether it is right for this longest example; a shorter one may need no resort."""
        return longest == self.longest or (longest < self.longest and not self.last_resort)


_FITTED: dict[object, _Fitted] = {}  # by model, device and settings; of this process


def first_tokens(wanted: int | Literal["auto"], device: torch.device) -> int:
    """Return the tokens of a training's micro-batch, before anything is known of what fits."""
    if wanted != "auto":
        return wanted
    return _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS


class MicroBatches:
    """What fits in a training; closed at its end, since measuring is without checkpointing.

    `max_tokens`: padded tokens of a micro-batch. `untried`: whether `try_worst` is to come first.
    """

    def __init__(
        self,
        model: nn.Module,
        max_tokens: int | Literal["auto"],
        checkpointing: bool | Literal["auto"],
        num_processes: int = 1,
    ) -> None:
        """Take the model, its two settings, and how many processes train together."""
        self.untried = _can_be_tried(device_of(model))
        self.max_tokens = first_tokens(max_tokens, device_of(model))
        self._is_set = max_tokens != "auto"
        self._model, self._num_processes = model, num_processes
        self._wanted, self._on = checkpointing, False
        self._case: tuple[object, int] | None = None  # which training it is, once it was tried

    def __enter__(self) -> MicroBatches:
        """Turn checkpointing on where it is set.

        Raises:
            ModelError: If the model has no layers for it.
        """
        if self._wanted is True and not self._switch_on():
            raise ModelError(
                f"{type(self._model).__name__} has no layers for gradient checkpointing; set "
                "gradient_checkpointing to false"
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Turn it off, whoever turned it on; remember what fitted."""
        if self._case:
            case, longest = self._case
            last_resort = self._on and self._wanted == "auto"
            _FITTED[case] = _Fitted(longest, self.max_tokens, last_resort)
        for module in self._model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # type: ignore[assignment]

    def try_worst(self, run: RunBatches, longest: int, num_examples: int) -> None:
        """Find what fits before the first step, by the worst batch of up to `num_examples`.

        Beside gradients and Adam's moments. It leaves no gradient, and random numbers go on as if
        it had not been. What fitted in a training like this is not looked for again. Of processes
        that train together all take what fits in each of them.

        Raises:
            ModelError: If one example of `longest` tokens does not fit.
        """
        trained = [p for p in self._model.parameters() if p.requires_grad]
        restore = _random_state(device_of(self._model))

        def run_worst(tokens: int) -> None:
            held = [torch.empty_like(p) for p in trained for _ in range(3)]
            run(worst_examples(longest, max(1, tokens // longest)), tokens)
            self._model.zero_grad()
            del held

        case = (*self._like(), num_examples)
        fitted = _FITTED.get(case)
        if fitted and fitted.serves(longest):
            longest, self.max_tokens = fitted.longest, fitted.max_tokens
            if fitted.last_resort:
                self._switch_on()
        else:
            most, lengths = min(self.max_tokens, num_examples * longest), np.array([longest])
            if self._is_set:  # and tried as it is
                _, self.max_tokens = within_memory(run_worst, most, lengths, self._relieve)
            else:
                self.max_tokens = most_tokens(run_worst, lengths, most, self._relieve)
            restore()
        self._case = case, longest
        self._agree()
        self.untried = False
        logger.info(
            "training in batches of up to %d tokens, gradient checkpointing %s",
            self.max_tokens,
            "on" if self._on else "off",
        )

    def fit(self, step: Callable[[int], T], lengths: Int[np.ndarray, " example"]) -> T:
        """Return what `step(max_tokens)` gives, which adds up the gradients of one optimizer step.

        When memory runs out it is done again with less: its gradients are dropped, and dropout
        draws what it drew. Not in one of several processes, for which the others would wait.

        Raises:
            ModelError: If it does not fit.
        """
        if self._num_processes > 1:
            return self._fit_or_end(step)
        attempt = partial(self._begin, step, _random_state(device_of(self._model)))
        found, self.max_tokens = within_memory(attempt, self.max_tokens, lengths, self._relieve)
        return found

    def _begin(self, step: Callable[[int], T], restore: Callable[[], None], tokens: int) -> T:
        self._model.zero_grad()
        restore()
        return step(tokens)

    def _fit_or_end(self, step: Callable[[int], T]) -> T:
        try:
            return step(self.max_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            cause = str(error).partition("\n")[0]
        raise ModelError(
            f"out of memory in one of {self._num_processes} processes that train together, with "
            f"batches of {self.max_tokens} tokens; set warmup.micro_batch_tokens (for a "
            f"fine-tuning: fine_tuning.micro_batch_tokens) to {max(1, self.max_tokens // 2)} or "
            f"fewer, or gradient_checkpointing beside it to true ({cause})"
        )

    def _like(self) -> tuple[object, ...]:
        """Return what trainings of the same model, device and settings have in common."""
        parameters = tuple(
            (tuple(p.shape), p.dtype, p.device, p.requires_grad) for p in self._model.parameters()
        )
        config = getattr(self._model, "config", None)
        kind = [getattr(config, name, None) for name in ("model_type", "_attn_implementation")]
        return *kind, parameters, self.max_tokens, self._is_set, self._wanted

    def _agree(self) -> None:
        """Take the fewest tokens of all processes, and checkpointing if one of them needs it."""
        if self._num_processes == 1:
            return
        own = torch.tensor([self.max_tokens, not self._on], device=device_of(self._model))
        torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MIN)
        self.max_tokens, off = own.tolist()
        if not off and not self._on:
            self._switch_on()

    def _relieve(self) -> str:
        """Turn checkpointing on if that is left to us, else return what the user can change."""
        if not self._on and self._wanted == "auto" and self._switch_on():
            logger.warning("out of memory with one example; going on with gradient checkpointing")
            return ""
        more = "set gradient_checkpointing to auto, " if self._wanted is False else ""
        return f"{more}lower data.max_length or lora.rank, or quantize the model"

    def _switch_on(self) -> bool:
        """Turn checkpointing on in every layer that knows it, and return whether there is one.

        transformers' own way makes the embeddings require a gradient too, which this needs not.
        """
        for module in self._model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = self._on = True  # type: ignore[assignment]
                recompute = partial(checkpoint, use_reentrant=False, context_fn=_contexts)
                module._gradient_checkpointing_func = recompute  # type: ignore[assignment]
        return self._on


def _contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return those of a layer's forward pass and of its second, which has a thread of its own."""
    return nullcontext(), nothing_packed()


def _can_be_tried(device: torch.device) -> bool:
    """Return whether running out of memory is an error there; a CPU's process is killed.

    A function, so that tests try on a CPU.
    """
    return device.type != "cpu"


def _random_state(device: torch.device) -> Callable[[], None]:
    """Return what sets random numbers back to where they are now; no other device is touched."""
    cpu = torch.get_rng_state()
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if own is not None:
            torch.cuda.set_rng_state(own, device)

    return restore

"""The last layer at labelled positions alone, wherever nothing there looks at another position.

The loss reads the last layer's output where there is a label. So what follows its attention (the
output projection, the MLP) need not be computed elsewhere, and no gradient is lost.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsift.data.encoding import Encoded
from gradsift.models.batch_size import is_out_of_memory
from gradsift.models.batches import Batch, device_of
from gradsift.models.kernels import kernels_for_batches
from gradsift.models.losses import label_logits

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 12
_known: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def modules_after_attention(model: nn.Module) -> Mapping[str, nn.Module]:
    """Return the modules that may be run at labelled positions alone, by name in the base model.

    They are looked for by their place, in the last layer, and tried: the logits at labels must
    stay the same. Found once for a base model.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    candidates = dict(_candidates(base))
    if device_of(model).type == "meta":  # no memory, so no numbers to try with
        return candidates
    if base not in _known:
        with kernels_for_batches(model):
            _known[base] = tuple(_tried(model, candidates))
        logger.debug("at labels alone: %s", ", ".join(_known[base]) or "nothing")
    return {name: candidates[name] for name in _known[base]}


@contextmanager
def labelled_alone(modules: Mapping[str, nn.Module], batch: Batch) -> Iterator[None]:
    """Run these modules on the positions of the batch that have a label; elsewhere they give 0."""

    def trim(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return batch.at_labels(inputs[0])

    def put_back(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return batch.spread(output.flatten(0, -2))

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(trim).remove)
            stack.callback(module.register_forward_hook(put_back).remove)
        yield


def _candidates(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the last layer's modules that multiply, of attention the last matrix alone."""
    found = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not found:
        return
    name, layers = found[0]
    for child, module in layers[-1].named_children():
        where = f"{name}.{len(layers) - 1}.{child}"
        matrices = [n for n, m in module.named_modules() if isinstance(m, _MATRICES)]
        if matrices and re.search(r"attn|attention", child):
            outermost = [n for n in matrices if not n.endswith("base_layer") and "lora_" not in n]
            yield f"{where}.{outermost[-1]}".rstrip("."), module.get_submodule(outermost[-1])
        elif any(parameter.dim() > 1 for parameter in module.parameters()):
            yield where, module


_MATRICES = (nn.Linear, Conv1D, LoraLayer)


@torch.no_grad()
def _tried(model: nn.Module, candidates: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield those with which the logits at labels stay as they were.

    First with all that a module is given and gives elsewhere a hundred times as large as what it
    meets, so that whatever is read of it shows; then run at labels alone. The logits may move by a
    share of what they move without the module, in half precision by more: other shapes round.
    """
    batch, whole = _random_batch(model), model.dtype == torch.float32
    calls = {name: _Calls(module) for name, module in candidates.items()}
    with ExitStack() as stack:
        for recorded in calls.values():
            stack.callback(recorded.handle.remove)
        expected = label_logits(model, batch).float()

    def moved(context: AbstractContextManager[object]) -> Tensor:
        with context:
            return (label_logits(model, batch).float() - expected).abs().max()

    for name, module in candidates.items():
        if not calls[name].take_and_give_all_tokens(batch):
            continue
        effect = moved(_changed(module, lambda tensor: tensor * 0))
        try:
            elsewhere = moved(_changed(module, partial(_enlarge_elsewhere, batch), both=True))
            trimmed = moved(labelled_alone({name: module}, batch))
        except RuntimeError as error:  # it wants a number of tokens
            if is_out_of_memory(error):
                raise
            continue
        if elsewhere <= 1e-3 * effect and trimmed <= (1e-3 if whole else 0.1) * effect:  # no NaN
            yield name


def _enlarge_elsewhere(batch: Batch, tensor: Tensor) -> Tensor:
    at_labels = batch.spread(torch.ones_like(batch.at_labels(tensor)[0])).bool()
    return torch.where(at_labels, tensor, 100 * tensor.abs().max())


class _Calls:
    """How a module is called while the model runs."""

    def __init__(self, module: nn.Module) -> None:
        self._calls: list[tuple[object, ...]] = []
        self.handle = module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, _: nn.Module, *call: Any) -> None:
        args, kwargs, output = call
        self._calls.append((*args, *kwargs, output))

    def take_and_give_all_tokens(self, batch: Batch) -> bool:
        """Return whether it was called once, with one tensor of all tokens, and returned one."""
        return len(self._calls) == 1 == len(self._calls[0]) - 1 and all(
            isinstance(value, Tensor) and value.shape[:-1] == batch.input_ids.shape
            for value in self._calls[0]
        )


@contextmanager
def _changed(
    module: nn.Module, change: Callable[[Tensor], Tensor], both: bool = False
) -> Iterator[None]:
    """Change what a module gives, or `both` that and what it is given."""
    with ExitStack() as stack:
        after = module.register_forward_hook(lambda _, inputs, output: change(output))  # type: ignore[arg-type]
        stack.callback(after.remove)
        if both:
            before = module.register_forward_pre_hook(lambda _, inputs: change(inputs[0]))
            stack.callback(before.remove)
        yield


def _random_batch(model: nn.Module) -> Batch:
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, _PROBE_TOKENS + 1))
    places = np.arange(_PROBE_TOKENS + 1)
    supervised = (places % 5 == 4, places > _PROBE_TOKENS - 4)
    examples = [Encoded(t.astype(np.int32), s) for t, s in zip(tokens, supervised, strict=True)]
    return Batch.of(examples, device_of(model))

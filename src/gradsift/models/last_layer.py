"""The last layer at labelled positions alone, wherever nothing there looks at another position.

The loss reads the last layer's output where there is a label. So what follows its attention (the
output projection, the MLP) need not be computed elsewhere, and no gradient is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradsift.data.encoding import Encoded
from gradsift.models.batches import Batch, device_of
from gradsift.models.losses import label_logits

_PROBE_TOKENS = 12
_known: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def modules_after_attention(model: nn.Module) -> Mapping[str, nn.Module]:
    """Return the modules that may be run at labelled positions alone, by name in the base model.

    They are looked for by their place, in the last layer, and tried: the logits at labels must
    stay the same. Found once for a base model.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base not in _known:
        _known[base] = tuple(_tried(model, dict(_candidates(base))))
    return {name: base.get_submodule(name) for name in _known[base]}


@contextmanager
def labelled_alone(modules: Mapping[str, nn.Module], batch: Batch) -> Iterator[None]:
    """Run these modules on the positions of the batch that have a label; elsewhere they give 0."""
    with ExitStack() as stack:
        for module in modules.values():
            handles = (
                module.register_forward_pre_hook(partial(_trim, batch)),
                module.register_forward_hook(partial(_put_back, batch)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        yield


def _trim(batch: Batch, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (batch.at_labels(inputs[0]), *inputs[1:])


def _put_back(
    batch: Batch, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    return batch.spread(output.flatten(0, -2))


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
        elif matrices:
            yield where, module


_MATRICES = (nn.Linear, Conv1D, LoraLayer)


@torch.no_grad()
def _tried(model: nn.Module, candidates: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield those with which the logits at labels stay the same."""
    device = device_of(model)
    if device.type == "meta":  # no memory, so no numbers to try with
        yield from candidates
        return
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, _PROBE_TOKENS + 1))
    places = np.arange(_PROBE_TOKENS + 1)
    supervised = (places % 5 == 4, places > _PROBE_TOKENS - 4)
    examples = [Encoded(t.astype(np.int32), s) for t, s in zip(tokens, supervised, strict=True)]
    batch = Batch.of(examples, device)
    expected = label_logits(model, batch)
    tolerance = (1e-4 if expected.dtype == torch.float32 else 0.02) * expected.abs().max()
    for name, module in candidates.items():
        try:
            with labelled_alone({name: module}, batch):
                found = label_logits(model, batch)
        except (AttributeError, TypeError):  # it returns more than a tensor
            continue
        if (found - expected).abs().max() <= tolerance:
            yield name

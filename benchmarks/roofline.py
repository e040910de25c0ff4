"""What the pool pass takes at least on a card: operations and bytes of every operator it runs.

The package's own code runs on tensors without memory; each operator is counted, and takes the
longer of operations / (reached · peak) and bytes / bandwidth, one after the other. Not in it: the
time to launch them, and to wait for the host. Nothing here is measured.

    python benchmarks/roofline.py --peak 989e12 --reached 0.68 --bandwidth 2.9e12
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import typer
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gradsift.config import EngineConfig
from gradsift.data.encoding import Encoded
from gradsift.gradients.basis import Basis
from gradsift.gradients.per_example import blocks
from gradsift.gradients.projection import project
from gradsift.models.batch_size import most_tokens
from gradsift.models.batches import MAX_EXAMPLES, lengths_of, plan_batches
from gradsift.pool.shards import shard_size, window_size
from pool_pass import SHAPES, build_model, draw_examples, useful_operations
from requirements import CARD, LONGEST, LORA_RANK, POOLS, Shape, room_of

META = torch.device("meta")
MEASURED, DIRECTIONS = ("1.5b", "3b", "7b", "qwen-7b", "14b"), (50, 150, 400)
MOST_TOKENS = 32768  # of a batch
TOKENS, LABELLED = 303, 0.5  # of the equal examples
BASE, LORA, EACH, BASIS = "base weights", "LoRA", "per-example gradients", "basis and norms"
ATTENTION, HEAD, REST = "attention", "head and loss", "elementwise"
GROUPS = (BASE, LORA, EACH, BASIS, ATTENTION, HEAD, REST)
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
# of these only as much is read as is returned, and no more is written than is given
_LOOKED_UP = {"embedding", "index", "gather"}
_PUT = {"index_put", "index_put_"}
_NOT_READ = {"copy_", "fill_", "zero_", "ones_like", "zeros_like", "new_zeros", "empty_like"}
_NOTHING = {"empty", "empty_like", "new_empty", "_unsafe_view"}
# on CUDA several kernels: maximum, difference, exponential, sum; zeros, then a copy into them
_TIMES_READ = {"logsumexp": 6, "slice_backward": 2}


class Operator(NamedTuple):
    """One call: its name, its group, and what it computes and moves."""

    name: str
    group: str
    operations: int
    bytes: int


class Operators(TorchDispatchMode):
    """Keep every operator that runs while it is open; views are none."""

    def __init__(self, weights: Mapping[int, str], vocabulary: int) -> None:
        """Take the group of each weight by its storage, and the width of logits."""
        super().__init__()
        self._weights, self._vocabulary = weights, vocabulary
        self.found: Counter[Operator] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and keep what it took."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(result)
        on_card = any(tensor.device == META for tensor in (*given, *made))
        if on_card and not func.is_view and name not in _NOTHING:
            in_place = {"addmm_": torch.ops.aten.addmm}  # PyTorch counts it out of place alone
            count = flop_registry.get(in_place.get(name, func.overloadpacket))
            # PyTorch's count of `bmm` does not know of the dtype that it may be given
            counted = args[:2] if name == "bmm" else args
            operations = count(*counted, **kwargs, out_val=result) if count else 0
            group = self._group(name, [*given, *made])
            self.found[Operator(name, group, operations, _moved(name, given, made))] += 1
        return result

    def _group(self, name: str, tensors: Sequence[torch.Tensor]) -> str:
        if name in _PRODUCTS:
            owners = (self._weights.get(_storage(tensor)) for tensor in tensors)
            # what belongs to no weight is of single examples, or of several layers' A, stacked
            other = LORA if name in {"mm", "addmm", "addmm_"} else EACH
            return next((owner for owner in owners if owner), other)
        if "attention" in name:
            return ATTENTION
        if name == "linalg_vector_norm":
            return BASIS
        logits = any(t.ndim and t.shape[-1] == self._vocabulary for t in tensors)
        return HEAD if logits else REST


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    """Return what is there of a tensor; what is expanded is there once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * prod(size for size, stride in sizes if stride)


def _moved(name: str, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> int:
    """Return the bytes that are read and written."""
    if name in _LOOKED_UP:
        return 2 * sum(_bytes(tensor) for tensor in made)
    if name in _PUT:
        return 2 * _bytes(given[-1])
    read = given[1:] if name in _NOT_READ else given
    times = _TIMES_READ.get(name, 1)
    return times * sum(map(_bytes, read)) + sum(map(_bytes, made))


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Call flash attention and the fused norm, as CUDA would."""

    def flash(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        assert kwargs.get("attn_mask") is None and kwargs["is_causal"]
        attention = torch.ops.aten._scaled_dot_product_flash_attention
        return attention(query, key, value, is_causal=True, scale=kwargs.get("scale"))[0]

    def norm(
        x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, epsilon: float
    ) -> torch.Tensor:
        # moves the same, and four bytes more a row; a norm of its own there is on cards alone
        return torch.nn.functional.layer_norm(x, shape, weight, None, epsilon)

    functional = "torch.nn.functional"
    with (
        patch(f"{functional}.scaled_dot_product_attention", flash),
        patch(f"{functional}.rms_norm", norm),
    ):
        yield


def count(
    model: PeftModel, examples: Sequence[Encoded], directions: int, max_tokens: int
) -> Counter[Operator]:
    """Return every operator of a pool pass over the examples, and how often it runs."""
    sizes = {name: out * into for name, (out, into) in blocks(model).items()}
    rows = {
        name: torch.empty(directions, size, dtype=torch.bfloat16, device=META)
        for name, size in sizes.items()
    }
    weights = {_storage(row): BASIS for row in rows.values()}
    for name, parameter in model.named_parameters():
        weights[_storage(parameter)] = LORA if "lora_" in name else BASE
    head = model.get_output_embeddings().weight
    weights[_storage(head)] = HEAD
    operators = Operators(weights, head.shape[0])
    with _as_on_cuda(), operators:
        project(model, examples, max_tokens, Basis(rows, frozenset(), META))
    return operators.found


@dataclass(frozen=True)
class Card:
    """Operations a second, the share of them that large products reach, and bytes a second."""

    peak: float = 989e12  # an H100's, dense, in bfloat16
    reached: float = 0.68
    bandwidth: float = 2.9e12
    memory: float = CARD
    host: float = 50e9  # from pinned host memory, beside the card's work

    def seconds(self, operators: Counter[Operator]) -> dict[str, tuple[float, str]]:
        """Return each group's seconds, and which of the two bounds the larger part of them."""
        found = {group: {"operations": 0.0, "bytes": 0.0} for group in GROUPS}
        for operator, times in operators.items():
            computing = operator.operations / (self.reached * self.peak)
            moving = operator.bytes / self.bandwidth
            bound = "operations" if computing > moving else "bytes"
            found[operator.group][bound] += times * max(computing, moving)
        return {
            group: (sum(by.values()), max(by, key=lambda bound: by[bound]))
            for group, by in found.items()
        }


def batches_of(shape: Shape, directions: int, card: Card) -> tuple[int, int]:
    """Return how many tokens a batch has, and bytes of the basis that wait in host memory.

    As the package does it: the basis first, then the most tokens that fit.
    """
    _, taken, waiting = room_of(shape, directions, int(card.memory))
    free = card.memory - shape.weight_bytes - taken

    def run(tokens: int) -> None:
        if tokens * (shape.activation_bytes + shape.logit_bytes) > free:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return most_tokens(run, np.array([LONGEST]), MOST_TOKENS), waiting


def like(examples: int, num_tokens: int, labelled: float) -> list[Encoded]:
    """Return equal examples of which `num_tokens` enter the model, the last ones labelled."""
    supervised = np.arange(num_tokens + 1) > num_tokens - round(labelled * num_tokens)
    return [Encoded(np.ones(num_tokens + 1, np.int32), supervised)] * examples


def shape_of(name: str) -> Shape:
    """Return a shape of `pool_pass.py` as `requirements.py` describes it."""
    config = SHAPES[name][1]
    width = config["hidden_size"] // config["num_attention_heads"]
    return Shape(
        name,
        config["hidden_size"],
        config["num_hidden_layers"],
        kv=width * config["num_key_value_heads"],
        mlp=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=config["tie_word_embeddings"],
    )


class Pass(NamedTuple):
    """Seconds by group and in copying, examples a second, and the useful share of the peak."""

    groups: dict[str, tuple[float, str]]
    copying: float
    speed: float
    share: float


def whole(one: Counter[Operator], two: Counter[Operator], layers: int) -> Counter[Operator]:
    """Return the operators of all layers from those of one and of two: they are alike."""
    assert one <= two
    return Counter({each: one[each] + (layers - 1) * (two[each] - one[each]) for each in two})


def estimate(
    models: Sequence[PeftModel], shape: Shape, examples: Sequence[Encoded], k: int, card: Card
) -> Pass:
    """Return what a pass over the examples takes, given the models of one and of two layers."""
    max_tokens, waiting = batches_of(shape, k, card)
    one, two = (count(model, examples, k, max_tokens) for model in models)
    groups = card.seconds(whole(one, two, shape.layers))
    num_batches = len(plan_batches(lengths_of(examples), max_tokens, MAX_EXAMPLES))
    copying = num_batches * waiting / card.host
    seconds = max(sum(part for part, _ in groups.values()), copying)
    first, both = (useful_operations(model, examples) for model in models)
    useful = first + (shape.layers - 1) * (both - first)
    return Pass(groups, copying, len(examples) / seconds, useful / seconds / card.peak)


def rows_of(name: str, num_directions: Sequence[int], card: Card) -> Iterator[list[str]]:
    """Yield a row for each number of directions: a batch of equal examples, a window of a pool."""
    shape = shape_of(name)
    models = [build_model(name, LORA_RANK, META, layers) for layers in (1, 2)]
    for k in num_directions:
        max_tokens = batches_of(shape, k, card)[0]
        engine = EngineConfig()
        window = window_size(
            engine, shard_size(engine, max(POOLS)), max_tokens, torch.device("cuda")
        )
        drawn = draw_examples(window, shape.vocabulary)
        equal = estimate(models, shape, like(max_tokens // TOKENS, TOKENS, LABELLED), k, card)
        pool = estimate(models, shape, drawn, k, card)
        working = sum(seconds for seconds, _ in equal.groups.values())
        yield [
            *(name, str(k), f"{max_tokens:,}"),
            *(f"{_percent(found.share)}, {found.speed:.3g}" for found in (equal, pool)),
            *(_cell(part / working, bound) for part, bound in equal.groups.values()),
            _percent(equal.copying / working) if equal.copying else "",
        ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _cell(share: float, bound: str) -> str:
    return f"**{_percent(share)}**" if bound == "operations" else _percent(share)


def table(shapes: Sequence[str], num_directions: Sequence[int], card: Card) -> str:
    """Return the table of docs/performance.md, as Markdown."""
    head = ["shape", "k", "tokens per batch", "equal", "pool", *GROUPS, "copying"]
    rows = [head, ["---"] * len(head)]
    for shape in shapes:
        rows.extend(rows_of(shape, num_directions, card))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(  # noqa: PLR0913, PLR0917
    shape: Annotated[list[str], typer.Option(help=", ".join(SHAPES))] = [*MEASURED],  # noqa: B006
    directions: Annotated[list[int], typer.Option(help="of the basis")] = [*DIRECTIONS],  # noqa: B006
    peak: Annotated[float, typer.Option(help="operations a second")] = Card.peak,
    reached: Annotated[float, typer.Option(help="share of it in products")] = Card.reached,
    bandwidth: Annotated[float, typer.Option(help="bytes a second")] = Card.bandwidth,
    memory: Annotated[float, typer.Option(help="bytes")] = Card.memory,
    host: Annotated[float, typer.Option(help="bytes a second from host memory")] = Card.host,
) -> None:
    """Print the share of the peak, examples a second, and where the time goes."""
    card = Card(peak, reached, bandwidth, memory, host)
    sys.stdout.write(table(shape, directions, card) + "\n")


if __name__ == "__main__":
    typer.run(main)

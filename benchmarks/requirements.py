"""GPU memory and hours of GIST for models of 1.5B, 7B and 14B, computed from their shapes.

Nothing here is measured: it counts floating-point operations and bytes, and takes the share of the
GPU's peak that `roofline.py` computes. `python benchmarks/requirements.py` prints the tables of
docs/requirements.md and of the README.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from gradsift.gradients.memory import room_for_basis
from gradsift.models.batch_size import FEW_TOKENS

PEAK = 989e12  # an H100's dense bfloat16 operations per second
LORA_RANK, DIRECTIONS, NUM_TARGET = 128, 150, 285  # the paper's, for MMLU
MEAN_TOKENS, LABELLED, LONGEST = 250, 0.5, 2048
WARMUP_SHARE = 0.05
POOLS = (270_000, 100_000)
BYTES, FLOAT_BYTES = 2, 4  # of a bfloat16 and of a float32
CARD = 80e9


@dataclass(frozen=True)
class Shape:
    """A Llama-like model, as its `config.json` describes it; `kv` is the width of keys.

    By `roofline.py`: `share` of the peak that a pass reaches, and how many times as long the pool
    pass takes because it is `waiting` for the part of the basis that lies in host memory.
    """

    name: str
    hidden: int
    layers: int
    kv: int
    mlp: int
    vocabulary: int
    tied: bool = False
    share: float = 1.0
    waiting: float = 1.0

    @property
    def useful(self) -> float:
        """Operations that a mean example cannot do without: 4 per token and parameter it meets.

        Forward and backward pass through frozen weights; logits at labels alone.
        """
        unlabelled = self.hidden * self.vocabulary * (1 - LABELLED)
        return 4 * MEAN_TOKENS * (self.multiplied + sum(self.blocks) - unlabelled)

    @property
    def multiplied(self) -> int:
        """Parameters in matrix products: all but the input embeddings; norms and biases aside."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv
        per_layer = attention + 3 * self.hidden * self.mlp
        return self.layers * per_layer + self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        """All weights in bfloat16."""
        embeddings = 0 if self.tied else self.hidden * self.vocabulary
        return BYTES * (self.multiplied + embeddings)

    @property
    def blocks(self) -> list[int]:
        """Parameters of every LoRA matrix on q, k, v and o."""
        wide, narrow = LORA_RANK * self.hidden, LORA_RANK * self.kv
        return self.layers * [wide, wide, wide, narrow, wide, narrow, wide, wide]

    @property
    def activation_bytes(self) -> int:
        """Kept of each token for the backward pass through frozen weights: an estimate.

        Two norms in float32, their outputs, queries, keys, values and attention's output, and
        three tensors of the MLP, for each layer.
        """
        return self.layers * (14 * self.hidden + 4 * self.kv + 6 * self.mlp)

    @property
    def training_bytes(self) -> int:
        """The same in a training: four LoRA layers keep their inputs after dropout, and masks."""
        return self.activation_bytes + self.layers * 4 * (BYTES + 1) * self.hidden

    @property
    def logit_bytes(self) -> int:
        """A label's logits and their gradient; the worst case has one at every token."""
        return 2 * BYTES * self.vocabulary

    @property
    def checkpointed_bytes(self) -> int:
        """The same with gradient checkpointing: what enters each layer, and what is there beside.

        The logits are gone by the time that the activations of one layer are computed again.
        """
        one_layer = self.training_bytes // self.layers
        return self.layers * BYTES * self.hidden + max(one_layer, self.logit_bytes)


SHAPES = (
    Shape("Qwen2.5-1.5B", 1536, 28, 256, 8960, 151_936, tied=True, share=0.41),
    Shape("Qwen2.5-7B", 3584, 28, 512, 18_944, 152_064, share=0.53),
    Shape("Llama-2-7B", 4096, 32, 4096, 11_008, 32_000, share=0.50),
    Shape("Qwen2.5-14B", 5120, 48, 1024, 13_824, 152_064, share=0.52, waiting=2.3),
)


def memory_of(shape: Shape) -> dict[str, int]:
    """Return bytes, by what takes them; on the GPU all but the last."""
    blocks, lora = [DIRECTIONS * size * BYTES for size in shape.blocks], sum(shape.blocks)
    # two slots for what is brought, beside a block in float32; or a whole gradient
    budget = max(lora * FLOAT_BYTES, 2 * max(blocks) + FLOAT_BYTES // BYTES * max(blocks))
    trained = shape.weight_bytes + 4 * FLOAT_BYTES * lora  # weights, gradients, Adam's moments
    measured, kept = (
        LONGEST * (size + shape.logit_bytes)
        for size in (shape.activation_bytes, shape.training_bytes)
    )
    return {
        "weights": shape.weight_bytes,
        "basis": sum(blocks),
        "pool pass at least": shape.weight_bytes + budget + measured,
        "training at least": trained + LONGEST * shape.checkpointed_bytes,
        "without checkpointing": trained + kept,
        # pinned memory is handed out in powers of two
        "host at most": sum(1 << (size - 1).bit_length() for size in blocks),
    }


def room_of(shape: Shape, directions: int, card: int) -> tuple[int, int, int]:
    """Return bytes for the basis and its sums, of a card that it takes, and of it that wait.

    As the package does it: a small batch first, what it leaves is for the basis, if all of it fits
    there, else a quarter of what is free, less two slots for what is brought.
    """
    free, sizes = card - shape.weight_bytes, [BYTES * directions * size for size in shape.blocks]
    total, sums = sum(sizes), FLOAT_BYTES // BYTES * max(sizes)
    batch = FEW_TOKENS * (shape.activation_bytes + shape.logit_bytes)
    room, kept = room_for_basis(free, batch, total + sums)
    kept = min(kept, room - sums)
    return (room, total, 0) if total <= kept else (room, kept, total - kept + 2 * max(sizes))


def parts_of(shape: Shape, directions: int, card: int) -> int:
    """Return in how many parts the basis is added up, each as large as the rest leaves room for."""
    room, _, waiting = room_of(shape, directions, card)
    total, largest = (BYTES * directions * each(shape.blocks) for each in (sum, max))
    parts, done = 0, 0.0
    while done < total:
        here = done * (1 - waiting / total)
        done += max(largest, (room - here) * BYTES / FLOAT_BYTES)
        parts += 1
    return parts


def hours_of(shape: Shape, num_pool: int) -> dict[str, float]:
    """Return hours on one GPU by stage."""
    lora = sum(shape.blocks)
    budget = (CARD - shape.weight_bytes) / 2
    row_blocks = ceil(NUM_TARGET * lora * FLOAT_BYTES / budget)
    # over the target, for its Gram matrix and the basis
    passes = (1 + row_blocks) / 2 + parts_of(shape, DIRECTIONS, int(CARD))
    examples = {
        "warm-up": WARMUP_SHARE * num_pool,
        "targets": NUM_TARGET * passes,
        "pool pass": num_pool * shape.waiting,
    }
    hours = shape.useful / (PEAK * shape.share) / 3600
    return {stage: count * hours for stage, count in examples.items()}


def _rows(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def memory_table() -> str:
    """Return the table of memory, as Markdown."""
    head = ("shape", "LoRA parameters", *memory_of(SHAPES[0]))
    rows: list[Sequence[str]] = [head, ["---"] * len(head)]
    for shape in SHAPES:
        found = (f"{number / 1e9:.1f} GB" for number in memory_of(shape).values())
        rows.append((shape.name, f"{sum(shape.blocks) / 1e6:.1f} M", *found))
    return _rows(rows)


def hours_table() -> str:
    """Return the table of hours, as Markdown."""
    head = ("shape", "pool", "warm-up", "targets", "pool pass", "in all")
    rows: list[Sequence[str]] = [head, ["---"] * len(head)]
    for shape in SHAPES:
        for num_pool in POOLS:
            hours = [*hours_of(shape, num_pool).values()]
            found = (f"{60 * number:.1f} min" for number in hours)
            rows.append((shape.name, f"{num_pool:,}", *found, f"{sum(hours):.1f} h"))
    return _rows(rows)


def summary_table() -> str:
    """Return the table of the README, as Markdown."""
    head = ("model", "GPU memory at least", *(f"{num_pool:,} examples" for num_pool in POOLS))
    rows: list[Sequence[str]] = [head, ["---"] * len(head)]
    for shape in SHAPES:
        memory = memory_of(shape)
        least = max(memory["pool pass at least"], memory["training at least"])
        hours = (f"{sum(hours_of(shape, num_pool).values()):.1f} h" for num_pool in POOLS)
        rows.append((shape.name, f"{ceil(least / 1e9)} GB", *hours))
    return _rows(rows)


if __name__ == "__main__":
    sys.stdout.write("\n\n".join((hours_table(), memory_table(), summary_table())) + "\n")

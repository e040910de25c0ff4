"""What a method has the base model do, as plain counts: for `plan`, and for what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gradsift.config import Config, WarmupConfig
from gradsift.methods.job import Job

Kind = Literal["training", "forward", "gram", "basis", "projection", "random projection"]
"""What is done with each example, and how its speed is found.

`training`: a part of an optimizer step. `forward`: one pass without gradients. The others take its
gradient: `gram` for inner products with others, `basis` to add it up to directions, `projection`
for its inner products with such directions, `random projection` with random ones.
"""


@dataclass(frozen=True)
class Amount:
    """How much there is of some examples."""

    num_examples: int
    num_tokens: int

    @classmethod
    def of(cls, num_tokens: np.ndarray) -> Amount:
        """Return the amount of examples of these lengths."""
        return cls(len(num_tokens), int(num_tokens.sum()))

    def of_part(self, num_examples: int) -> Amount:
        """Return what so many of the examples are expected to be, drawn at random.

        >>> Amount(10, 300).of_part(2)
        Amount(num_examples=2, num_tokens=60)
        """
        return Amount(num_examples, round(self.num_tokens * num_examples / self.num_examples))

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.num_examples + other.num_examples, self.num_tokens + other.num_tokens)


@dataclass(frozen=True)
class Sizes:
    """How large pool and targets are; `ranks` of the targets' subspaces, where they are known."""

    pool: Amount
    targets: Mapping[str, Amount]
    ranks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, ranks: Mapping[str, int] | None = None) -> Sizes:
        """Return those of encoded sets."""
        pool, *targets = (
            Amount.of(encoded.table(["num_tokens"])["num_tokens"].to_numpy())
            for encoded in (job.pool, *job.targets.values())
        )
        return cls(pool, dict(zip(job.targets, targets, strict=True)), ranks or {})

    @property
    def all_targets(self) -> Amount:
        """The examples of all targets together."""
        return sum(self.targets.values(), Amount(0, 0))


@dataclass(frozen=True)
class Work:
    """One piece of a method's work; `label` says in `plan` what it is, several may share one.

    `amount` goes through the model `passes` times: once per epoch or checkpoint. `directions`: with
    how many vectors of its length each gradient is multiplied. `kept`: bytes that are stored of an
    example and pass; a forward pass without any keeps losses and hidden states.
    """

    label: str
    kind: Kind
    amount: Amount
    passes: int = 1
    directions: int = 0
    kept: int = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens go through the model, over all passes."""
        return self.passes * self.amount.num_tokens

    def flops(self, multiplied: int, adapter: int) -> float:
        """Return the floating-point operations, a multiplication and an addition being two.

        With P parameters that are `multiplied` with every token, d of the `adapter`, T tokens, E
        examples times passes and k directions: 2·P·T forward; (4·P + 6·d)·T with gradients of the
        adapter, forward and back through frozen weights; and 2·k·d·E for products with directions.
        Attention's products of queries with keys, of which few tokens need few, are not counted.

        >>> Work("pool pass", "forward", Amount(2, 10)).flops(1000, 8)
        20000.0
        """
        if self.kind == "forward":
            return 2.0 * multiplied * self.num_tokens
        products = 2.0 * self.directions * adapter * self.passes * self.amount.num_examples
        return (4.0 * multiplied + 6.0 * adapter) * self.num_tokens + products


def num_checkpoints(warmup: WarmupConfig) -> int:
    """Return at how many adapters gradients are measured."""
    return warmup.checkpoints if _trains(warmup) else 1


def warm_up(warmup: WarmupConfig, sizes: Sizes) -> tuple[Work, ...]:
    """Return the training of a warm-up, nothing where none is trained."""
    if not _trains(warmup):
        return ()
    trained_on = sizes.pool.of_part(max(1, round(warmup.fraction * sizes.pool.num_examples)))
    return (Work("warm-up", "training", trained_on, warmup.epochs),)


def projected(
    gathered: Amount, sizes: Sizes, directions: int, warmup: WarmupConfig
) -> tuple[Work, Work]:
    """Return the pass over the pool that projects on combinations of gathered gradients.

    The combinations are added up first, in another pass over what they are made of. Kept are
    coordinates in float16 and, for each target, their length, loss and norm in float32.
    """
    passes, kept = num_checkpoints(warmup), 2 * directions + 12 * len(sizes.targets)
    return (
        Work("pool pass", "basis", gathered, passes, directions),
        Work("pool pass", "projection", sizes.pool, passes, directions, kept),
    )


def gram_of_targets(config: Config, sizes: Sizes, label: str) -> list[Work]:
    """Return the Gram matrices of each target's gradients; `label` is followed by its name."""
    passes = num_checkpoints(config.warmup)
    return [
        Work(f"{label} {name}", "gram", amount, passes, directions=amount.num_examples)
        for name, amount in sizes.targets.items()
    ]


def _trains(warmup: WarmupConfig) -> bool:
    return warmup.mode == "train" and warmup.adapter is None

"""Launches and bytes of one batch of the pool pass on a GPU, counted without one.

As `roofline.py` does it: the package's own code on tensors without memory. An operator that is no
view is a launch; of those that run several kernels two are counted for what they are, the others
as one. Batches are of equal examples, as large as fits.

    python benchmarks/launches.py --shape 1.5b --shape 7b
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Annotated, NamedTuple

import typer

from pool_pass import SHAPES, build_model
from requirements import LORA_RANK
from roofline import (
    GROUPS,
    LABELLED,
    META,
    TOKENS,
    Card,
    Operator,
    batches_of,
    count,
    like,
    shape_of,
    whole,
)

_KERNELS = {"logsumexp": 4, "slice_backward": 2}  # as in `roofline.py`


class Counts(NamedTuple):
    """What runs: launches, and bytes read and written."""

    launches: int
    bytes: int


def counts(operators: Counter[Operator], group: str = "") -> Counts:
    """Return launches and bytes of all operators, or of a group."""
    chosen = [
        (operator, times) for operator, times in operators.items() if group in {"", operator.group}
    ]
    return Counts(
        sum(times * _KERNELS.get(operator.name, 1) for operator, times in chosen),
        sum(times * operator.bytes for operator, times in chosen),
    )


def row_of(name: str, directions: int, tokens: int) -> list[str]:
    """Return launches and gigabytes of a batch, of one layer of it, and of each group."""
    shape = shape_of(name)
    tokens = tokens or batches_of(shape, directions, Card())[0]
    models = (build_model(name, LORA_RANK, META, layers) for layers in (1, 2))
    examples = like(tokens // TOKENS, TOKENS, LABELLED)
    one, two = (count(model, examples, directions, tokens) for model in models)
    batch = whole(one, two, shape.layers)
    parts = [batch, two - one]
    cells = [_cell(counts(part)) for part in parts]
    cells += [_cell(counts(batch, group)) for group in GROUPS]
    return [name, str(directions), f"{tokens:,}", *cells]


def _cell(found: Counts) -> str:
    return f"{found.launches:,}, {found.bytes / 1e9:.1f}"


def main(
    shape: Annotated[list[str], typer.Option(help=", ".join(SHAPES))] = ["1.5b", "7b"],  # noqa: B006
    directions: Annotated[int, typer.Option(help="of the basis")] = 150,
    tokens: Annotated[int, typer.Option(help="per batch; 0: as many as fit")] = 0,
) -> None:
    """Print launches and gigabytes, as Markdown."""
    head = ["shape", "k", "tokens per batch", "batch", "of it a layer", *GROUPS]
    rows = [head, ["---"] * len(head), *(row_of(name, directions, tokens) for name in shape)]
    sys.stdout.writelines(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    typer.run(main)

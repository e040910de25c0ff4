"""Hours of the experiment on one H100, for one benchmark: computed from shapes, not measured.

    PYTHONPATH=benchmarks python examples/paper/hours.py

How fast a pass is comes from `benchmarks/roofline.py`, with the card's figures that it assumes.
"""

from __future__ import annotations

import sys

import pool_pass
from gradsift.evaluation.tables import markdown
from requirements import LABELLED, LORA_RANK, MEAN_TOKENS, WARMUP_SHARE
from roofline import META, Card, batches_of, estimate, like, shape_of

NUM_POOL = 270_679
DIRECTIONS = 150
"""Of GIST's subspace for MMLU, the largest of the three."""
CHECKPOINTS, DIMENSION, PRODUCTS = 4, 8192, 3
"""LESS's warm-up and projection, whose float32 numbers go in as three of bfloat16."""
NUM_TRAININGS, EPOCHS = 9, 4
"""Three each on GIST's picks, on LESS's and on random ones."""
MODELS = {
    "Llama-2-7B": "7b",
    "Mistral-7B": "mistral-7b",
    "Llama-3.2-3B": "llama-3b",
    "Qwen2.5-1.5B": "1.5b",
}
"""Their shapes in `pool_pass.py`, which lacks these two."""
OTHER_SHAPES = {
    "mistral-7b": pool_pass._shape(4096, 32, (32, 8), 14336, 32000)
    | {"tie_word_embeddings": False},
    "llama-3b": pool_pass._shape(3072, 28, (24, 8), 8192, 128256) | {"tie_word_embeddings": True},
}


def hours_of(name: str, card: Card) -> dict[str, float]:
    """Return the hours of each part of the experiment for a shape of `pool_pass.py`."""
    shape = shape_of(name)
    models = [pool_pass.build_model(name, LORA_RANK, META, layers) for layers in (1, 2)]

    def whole_pool(directions: int) -> float:
        """Return seconds of a pass over the pool, in batches of equal examples."""
        count = batches_of(shape, directions, card)[0] // MEAN_TOKENS
        batch = like(count, MEAN_TOKENS, LABELLED)
        return NUM_POOL / estimate(models, shape, batch, directions, card).speed

    plain = whole_pool(1)  # hardly more than forward and backward pass: a training's, too
    operations = PRODUCTS * 2 * DIMENSION * sum(shape.blocks)
    projecting = NUM_POOL * operations / (card.peak * card.reached)
    seconds = {
        "GIST": WARMUP_SHARE * plain + whole_pool(DIRECTIONS),
        "LESS": CHECKPOINTS * (WARMUP_SHARE * plain + plain + projecting),
        f"{NUM_TRAININGS} fine-tunings": NUM_TRAININGS * EPOCHS * WARMUP_SHARE * plain,
    }
    return {part: each / 3600 for part, each in seconds.items()}


def row_of(model: str) -> list[str]:
    """Return a row of the table for one of `MODELS`."""
    for name, shape in OTHER_SHAPES.items():
        pool_pass.SHAPES.setdefault(name, ("llama", shape))
    hours = hours_of(MODELS[model], Card())
    return [model, *(f"{each:.1f} h" for each in [*hours.values(), sum(hours.values())])]


def table() -> str:
    """Return the table of README.md, as Markdown."""
    head = ["model", "GIST", "LESS", f"{NUM_TRAININGS} fine-tunings", "in all"]
    return markdown([head, *map(row_of, MODELS)])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")

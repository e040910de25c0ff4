"""Equal examples, whose gradients are equal: computed once, and combined as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded


def distinct(keys: Sequence[object]) -> tuple[list[int], np.ndarray]:
    """Return the first index of each distinct key, and for each key its place among those.

    >>> distinct(["a", "b", "a"])[1].tolist()
    [0, 1, 0]
    """
    places: dict[object, int] = {}
    inverse = np.array([places.setdefault(key, len(places)) for key in keys])
    return [int(np.flatnonzero(inverse == i)[0]) for i in range(len(places))], inverse


def distinct_examples(
    target: EncodedSet, rows: Sequence[int] | np.ndarray | None = None
) -> tuple[list[Encoded], np.ndarray]:
    """Return the different examples (of all, or of some rows), and for each which of them it is.

    Equal examples have equal gradients: they are computed once, so that no rounding tells them
    apart and blows up the difference into a direction.
    """
    return merge_equal(target.examples(range(len(target)) if rows is None else rows))


def merge_equal(examples: Sequence[Encoded]) -> tuple[list[Encoded], np.ndarray]:
    """Return the different ones among some examples, and for each which of them it is."""
    first, inverse = distinct([(e.input_ids.tobytes(), e.supervised.tobytes()) for e in examples])
    return [examples[i] for i in first], inverse


def merge_rows(
    combination: Float[np.ndarray, "query direction"],
    inverse: Int[np.ndarray, " query"],
    num_distinct: int,
) -> Float[np.ndarray, "distinct direction"]:
    """Return a combination of examples as one of the different ones among them."""
    merged = np.zeros((num_distinct, combination.shape[1]))
    np.add.at(merged, inverse, combination)
    return merged

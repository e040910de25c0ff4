"""A short vector for each gradient: inner products of the vectors stand for those of the gradients.

Of every block (the matrix A or B of a layer) two things are kept: the coordinates on the leading
directions of a sample of pool gradients, and, of what is left, products with random signs over √m
(Johnson and Lindenstrauss, 1984; signs: Achlioptas, 2003), which estimate an inner product without
bias and with a variance of the residual's energy squared over m. Pool gradients have few strong
directions in common, so that most of an inner product is kept exactly and little is left to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradsift.config import Config
from gradsift.data.encoding import Encoded
from gradsift.determinism import one_thread
from gradsift.errors import ConfigError
from gradsift.gradients.basis import Shapes, dtype_kept, first_part
from gradsift.gradients.gram import FLOAT_BYTES
from gradsift.gradients.memory import memory_budget, small_batch
from gradsift.gradients.per_example import blocks, each_batch, gradient_scale
from gradsift.gradients.projection import Projections, product
from gradsift.models.batch_size import within_memory
from gradsift.models.batches import device_of, group_examples, lengths_of, to_device
from gradsift.runs.atomic import write_atomically

_MOST_DIRECTIONS = 64  # of a block
_LARGEST = 127  # of an int8


@dataclass(frozen=True)
class Sketch:
    """What a gradient is multiplied with, block by block: `numbers[name]` (number × parameter)."""

    numbers: Mapping[str, Float[Tensor, "number _"]]

    @property
    def dimension(self) -> int:
        """How many numbers stand for a gradient."""
        return sum(map(len, self.numbers.values()))

    def project(
        self, model: nn.Module, examples: Sequence[Encoded], max_tokens: int
    ) -> Projections:
        """Return every example's numbers as coordinates, its loss and the norm of its gradient."""
        device, scale = device_of(model), gradient_scale(model)
        found = torch.zeros(len(examples), self.dimension, device=device)
        norms, losses = torch.empty(2, len(examples), device=device)
        ends = np.cumsum([len(block) for block in self.numbers.values()]).tolist()
        columns = dict(zip(self.numbers, map(slice, [0, *ends], ends), strict=True))
        for group, backpropagate in each_batch(
            model, examples, group_examples(model, examples, max_tokens)
        ):
            indices = to_device(group, device)
            squares = torch.zeros(len(group), device=device)

            def take(
                name: str, gradient: Tensor, indices: Tensor = indices, squares: Tensor = squares
            ) -> None:
                flat = gradient.flatten(1)
                found[indices, columns[name]] = product(flat, self.numbers[name]) / scale
                squares.add_(torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square_())

            losses[indices] = backpropagate(take)
            norms[indices] = squares.sqrt_() / scale
        return Projections(found, losses, norms)


@dataclass(frozen=True)
class _Block:
    """What a sample says of a block: directions as combinations of its gradients.

    `energies`: mean squared coordinates of gradients that did not make the directions, at length 1
    all blocks together; `energy`: their mean squared length in this block.
    """

    combination: Float[np.ndarray, "example direction"]
    energies: Float[np.ndarray, " direction"]
    energy: float


def fit_sketch(
    model: nn.Module,
    sample: Sequence[Encoded],
    config: Config,
    path: Path,
    check: Callable[[Float[np.ndarray, " example"]], None],
) -> None:
    """Choose directions and signs by a sample of the pool, and store what `load_sketch` reads.

    The gradients of every second example of the sample make the directions; the others say what
    these are worth. `check` is given the squared lengths of all.

    Raises:
        ConfigError: If there are more blocks than numbers.
    """
    shapes, dimension = blocks(model), config.index.dimension
    if dimension < 2 * len(shapes):
        raise ConfigError(
            f"index.dimension={dimension} leaves less than two numbers to each of the "
            f"{len(shapes)} adapted matrices; give {2 * len(shapes)} at least"
        )
    tokens, lengths = small_batch(config.engine), lengths_of(sample)
    memory = memory_budget(config.engine, device_of(model))
    look = partial(_look_at_blocks, model, sample, memory=memory)
    (found, squares), tokens = within_memory(look, tokens, lengths)
    check(squares)
    num_directions, num_signs = allocate(
        [block.energies for block in found.values()],
        np.array([block.energy for block in found.values()]),
        dimension,
    )
    kept = {
        name: block.combination[:, :count]
        for (name, block), count in zip(found.items(), num_directions, strict=True)
    }
    directions, _ = within_memory(partial(_combine, model, sample, kept), tokens, lengths)
    tensors = {name: block.half().cpu() for name, block in directions.items()}
    tensors["signs"], tensors["seed"] = torch.tensor(num_signs), torch.tensor([config.index.seed])
    chosen = zip(found.values(), num_directions, strict=True)
    left = [block.energy - block.energies[:count].sum() for block, count in chosen]
    tensors["error"] = torch.tensor([_expected_error(np.array(left), num_signs)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def allocate(
    energies: Sequence[Float[np.ndarray, " _"]],
    totals: Float[np.ndarray, " block"],
    dimension: int,
) -> tuple[Int[np.ndarray, " block"], Int[np.ndarray, " block"]]:
    """Return how many directions and how many signs each block gets, `dimension` in all.

    The variance of an inner product is Σ R²/m over the blocks, R being what the directions leave of
    a block's energy and m its signs: least where m ∝ R, and then (Σ R)² / Σ m. Directions are taken
    in the order of their energy as long as that falls. A block has one sign at least.

    >>> energies = [np.array([0.5, 0.1]), np.array([0.01])]
    >>> directions, signs = allocate(energies, np.array([0.7, 0.3]), 8)
    >>> directions.tolist(), signs.tolist()
    ([2, 0], [2, 4])
    """
    falling = [np.minimum.accumulate(np.clip(own, 0, None)) for own in energies]
    owners = np.repeat(np.arange(len(falling)), [len(own) for own in falling])
    order = np.argsort(-np.concatenate(falling), kind="stable")[: dimension - len(totals)]
    left = totals.sum() - np.cumsum([0.0, *np.concatenate(falling)[order]])
    variance = np.clip(left, 0, None) ** 2 / (dimension - np.arange(len(left)))
    taken = owners[order[: int(variance.argmin())]]
    num_directions = np.bincount(taken, minlength=len(totals))
    rest = [
        max(total - own[:count].sum(), 0)
        for total, own, count in zip(totals, falling, num_directions, strict=True)
    ]
    spare = dimension - len(taken) - len(totals)
    shares = np.array(rest) / max(sum(rest), np.finfo(float).tiny) * spare
    num_signs = 1 + shares.astype(int)
    first = np.argsort(num_signs - 1 - shares, kind="stable")
    num_signs[first[: dimension - len(taken) - num_signs.sum()]] += 1
    return num_directions, num_signs


def _expected_error(left: np.ndarray, num_signs: np.ndarray) -> float:
    """Return the standard deviation of the product of two gradients of length 1, as sketched."""
    return float(np.sqrt((np.clip(left, 0, None) ** 2 / num_signs).sum()))


def read_expected_error(path: Path) -> float:
    """Return by how much the product of two gradients of length 1 is off, as a sample has it."""
    with safe_open(path, "np") as file:
        return float(file.get_tensor("error")[0])


def load_sketch(model: nn.Module, path: Path) -> Sketch:
    """Return a stored sketch on the model's device; its signs are drawn again."""
    stored, device = load_file(path), device_of(model)
    num_signs, numbers = stored["signs"].tolist(), {}
    generator = np.random.Philox(int(stored["seed"]))  # whose bits no version changes
    for (name, shape), count in zip(blocks(model).items(), num_signs, strict=True):
        directions = stored[name].to(device, torch.float32)
        signs = to_device(draw_signs(generator, (count, prod(shape))), device)
        signs -= (signs @ directions.T) @ directions  # of what the directions leave
        numbers[name] = torch.cat([directions, signs / count**0.5]).to(dtype_kept(model))
    return Sketch(numbers)


def draw_signs(
    generator: np.random.Philox, shape: tuple[int, int]
) -> Float[np.ndarray, "sign parameter"]:
    """Return +1 and -1, sixty-four to a draw."""
    words = generator.random_raw(-(-prod(shape) // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=prod(shape))
    return bits.reshape(shape).astype(np.float32) * 2 - 1


def quantize(
    rows: Float[Tensor, "example number"],
) -> tuple[Int[Tensor, "example number"], Float[Tensor, " example"]]:
    """Return rows as int8, and the length of a step of each.

    A step is the largest entry over 127: as an error of an inner product with a row of length 1 it
    is a step over √12, less than a thousandth of the row's length as a rule.
    """
    steps = rows.abs().amax(dim=1) / _LARGEST
    numbers = (rows / steps.masked_fill(steps == 0, 1)[:, None]).round()
    return numbers.to(torch.int8), steps


def _look_at_blocks(
    model: nn.Module, sample: Sequence[Encoded], max_tokens: int, memory: int
) -> tuple[dict[str, _Block], Float[np.ndarray, " example"]]:
    """Return what the sample says of every block, and the squared lengths of its gradients.

    The rows of some blocks are held at a time.
    """
    left: Shapes = blocks(model)
    found: dict[str, _Block] = {}
    squares = None
    while left:
        part = first_part(left, memory // (FLOAT_BYTES * len(sample)))
        rows, total = _rows(model, sample, part, max_tokens)
        squares = total if squares is None else squares
        # what is not finite is told by the squares
        lengths = squares.sqrt().masked_fill((squares == 0) | ~squares.isfinite(), 1)
        for name in part:
            unit = (rows.pop(name) / lengths[:, None]).nan_to_num_(0, 0, 0)
            found[name] = _look_at(unit, 1 / lengths)
        left = {name: shape for name, shape in left.items() if name not in part}
    assert squares is not None, "an adapter has blocks"
    return found, squares.cpu().numpy()


def _rows(
    model: nn.Module, sample: Sequence[Encoded], shapes: Shapes, max_tokens: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients of some blocks, and the squared length of each whole gradient."""
    device = device_of(model)
    rows = {name: torch.zeros(len(sample), prod(s), device=device) for name, s in shapes.items()}
    squares = torch.zeros(len(sample), device=device)
    groups = group_examples(model, sample, max_tokens)
    for group, backpropagate in each_batch(model, sample, groups):
        indices = to_device(group, device)

        def take(name: str, gradient: Tensor, indices: Tensor = indices) -> None:
            flat = gradient.flatten(1).float()
            squares[indices] += flat.square().sum(1)
            if name in rows:
                rows[name][indices] = flat

        backpropagate(take)
    return rows, squares


def _look_at(rows: Float[Tensor, "example _"], scale: Float[Tensor, " example"]) -> _Block:
    """Return what rows of length 1 in all say of a block; `scale` made them of the gradients."""
    made_of, others = rows[::2], rows[1::2]
    with one_thread():
        values, vectors = np.linalg.eigh((made_of @ made_of.T).double().cpu().numpy())
    values, vectors = values[::-1], vectors[:, ::-1]
    count = min(_MOST_DIRECTIONS, int((values > values[0] * 1e-6).sum()))
    combination = vectors[:, :count] / np.sqrt(values[:count])
    directions = to_device(combination.astype(np.float32), rows.device).T @ made_of
    energies = (others @ directions.T).square().mean(0).cpu().numpy()
    whole = np.zeros((len(rows), count))
    whole[::2] = combination * scale[::2].cpu().numpy()[:, None]
    return _Block(whole, energies, float(others.square().sum(1).mean()))


def _combine(
    model: nn.Module,
    sample: Sequence[Encoded],
    combinations: Mapping[str, Float[np.ndarray, "example direction"]],
    max_tokens: int,
) -> dict[str, Tensor]:
    """Return the directions of every block, added up in one pass over the sample."""
    device, shapes = device_of(model), blocks(model)
    weights = {n: to_device(c.astype(np.float32), device) for n, c in combinations.items()}
    sums = {
        name: torch.zeros(own.shape[1], prod(shapes[name]), device=device)
        for name, own in weights.items()
    }
    for group, backpropagate in each_batch(
        model, sample, group_examples(model, sample, max_tokens)
    ):
        indices = to_device(group, device)

        def accumulate(name: str, gradient: Tensor, indices: Tensor = indices) -> None:
            sums[name].addmm_(weights[name][indices].T, gradient.flatten(1).float())

        backpropagate(accumulate)
    return sums

"""The slow, obvious way: one example at a time, autograd, whole rows, a textbook SVD.

Nothing here is shared with the package but the adapted model and the encoded examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from gradsift.data.encoding import Encoded


def loss(model: nn.Module, example: Encoded) -> Tensor:
    """Mean negative log-likelihood of the supervised tokens, with all logits."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(example.input_ids).long()[None].to(device)
    labels = ids.clone()
    labels[0, ~torch.from_numpy(example.supervised).to(device)] = -100
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def gradient_rows(model: nn.Module, examples: Sequence[Encoded]) -> Tensor:
    """G: one row of concatenated LoRA gradients per example."""
    parameters = lora_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    rows = []
    for example in examples:
        gradients = torch.autograd.grad(loss(model, example), list(parameters.values()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return torch.stack(rows)


def select(
    target: Tensor, pool: Tensor, rank: int | None = None, share: float = 0.95
) -> tuple[Tensor, Tensor, Tensor]:
    """GIST by the book: coordinates of the pool, of the target, and the max-cosine score."""
    _, sigma, right = torch.linalg.svd(target, full_matrices=False)
    if rank is None:
        variance = torch.cumsum(sigma**2, 0)
        rank = int((variance < share * variance[-1] * (1 - 1e-12)).sum()) + 1
    basis = right[:rank]
    coordinates, references = pool @ basis.T, target @ basis.T
    cosines = F.normalize(coordinates) @ F.normalize(references).T
    return coordinates, references, cosines.max(dim=1).values


def splitmix_signs(num_parameters: int, dimension: int, seed: int) -> np.ndarray:
    """The whole projection of LESS as one matrix (parameter × direction) of ±1, by the book.

    SplitMix64 with unsigned integers that wrap: a sign is a bit of the hash of its place.
    """
    with np.errstate(over="ignore"):

        def mix(z: np.ndarray) -> np.ndarray:
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return z ^ (z >> np.uint64(31))

        step = np.uint64(0x9E3779B97F4A7C15)
        start = mix(np.uint64(seed) * step)
        places = np.arange(1, num_parameters * dimension // 64 + 1, dtype=np.uint64)
        words = mix(start + places * step)
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return bits.reshape(num_parameters, dimension).astype(np.float64) * 2 - 1


def adam_direction(gradient: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """What LESS takes for a pool example: Adam's next step, without bias correction."""
    moved = 0.9 * mean + 0.1 * gradient
    return moved / torch.sqrt(0.999 * square + 0.001 * gradient**2 + 1e-8)


def picks_in_turn(rankings: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Rows and their columns: every column sorted whole, each picks its best in turn."""
    orders = [[int(r) for r in np.argsort(-c, kind="stable") if c[r] > -np.inf] for c in rankings.T]
    picked: dict[int, int] = {}
    while len(picked) < count:
        for column, order in enumerate(orders):
            left = [row for row in order if row not in picked]
            if left and len(picked) < count:
                picked[left[0]] = column
    return [*picked.items()]


def balanced_picks(rankings: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Rows and their columns: the best row left of the column whose normalised sum is lowest."""
    columns = [column.astype(np.float64) for column in rankings.T]
    normalised = {
        number: (column - column.mean()) / column.std()
        for number, column in enumerate(columns)
        if np.isfinite(column).all() and len(set(column)) > 1
    }
    picked: list[tuple[int, int]] = []
    for _ in range(count):
        rows = [row for row, _ in picked]
        served = {number: sum(column[rows]) for number, column in normalised.items()}
        least = min(served, key=lambda number: served[number])
        left = [row for row in range(len(rankings)) if row not in rows]
        picked.append((max(left, key=lambda row: rankings[row, least]), least))
    return picked


def influence(
    target: Tensor, pool: Tensor, sample: np.ndarray, damping: float
) -> tuple[Tensor, Tensor]:
    """F⁻¹q (query × parameter) and ⟨g, F⁻¹q⟩ (pool × query), F being formed whole.

    `sample`: the rows of the pool that make F; for one of them F is formed again without it.
    """
    rows = pool[sample]
    fisher = rows.T @ rows / len(rows)
    values = torch.linalg.eigvalsh(fisher)
    fisher += damping * values[values > values.max() * 1e-12].mean() * torch.eye(len(fisher))
    directions = torch.linalg.solve(fisher, target.T).T
    products = pool @ directions.T
    for i in sample:
        without = fisher - torch.outer(pool[i], pool[i]) / len(rows)
        products[i] = torch.linalg.solve(without, target.T).T @ pool[i]
    return directions, products


def datamodeling(losses: np.ndarray, foretold: np.ndarray) -> float:
    """Spearman's correlation of what is foretold with how low the loss is, mean over examples."""
    found = [
        0.0 if np.ptp(foretold[:, e]) == 0 else spearmanr(foretold[:, e], -losses[:, e]).statistic
        for e in range(losses.shape[1])
    ]
    return float(np.mean(found))


def jackknife_error(losses: np.ndarray, foretold: np.ndarray) -> float:
    """The standard error of that from leaving out one subset after the other."""
    count = len(losses)
    without = [datamodeling(np.delete(losses, n, 0), np.delete(foretold, n, 0))
               for n in range(count)]  # fmt: skip
    return float(np.sqrt((count - 1) * np.var(without)))


def reciprocal_ranks(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Reciprocal rank fusion by counting, for each example, those that are better or equal."""
    total = np.zeros(len(scores[0]))
    for values in scores:
        for example, value in enumerate(values):
            better = sum(other > value for other in values)
            equal = sum(other == value for other in values)  # itself among them
            total[example] += 1 / (60 + better + (1 + equal) / 2)
    return total

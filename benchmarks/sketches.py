"""Which short vectors for gradients tell most for their bytes: five ways, on whole gradients.

    python benchmarks/sketches.py RUN          # a run on ../shared, by `gist`

Gradients of pool and target examples are formed whole, at the run's adapter. Each way keeps so many
numbers of a gradient; printed is how far inner products of gradients at length 1 are off, and how
near gist's scores come to the exact ones: Spearman's correlation, Jaccard similarity of the best
5 %. `halves` are float16, two bytes a number; `bytes` int8 with a step for each example.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import hadamard
from scipy.stats import spearmanr
from torch import Tensor, nn

from gradsift.data.encoding import Encoded
from gradsift.gradients.per_example import blocks, each_batch
from gradsift.gradients.sketch import fit_sketch, load_sketch, quantize
from gradsift.gradients.subspace import Subspace, fit_subspace
from gradsift.methods.job import open_job
from gradsift.models.batches import group_examples, to_device
from gradsift.runs.folder import Run
from gradsift.runs.opening import read_config
from gradsift.selection.stages import RunStages

Blocks = Mapping[str, Tensor]
"""By block: example × rows × columns, gradients at length 1 all blocks together."""


def whole_gradients(model: nn.Module, examples: list[Encoded]) -> dict[str, Tensor]:
    """Return the gradients of the examples, each at length 1."""
    rows = {name: torch.zeros(len(examples), *shape) for name, shape in blocks(model).items()}
    for group, backpropagate in each_batch(model, examples, group_examples(model, examples, 2048)):
        indices = to_device(group, torch.device("cpu"))

        def take(name: str, gradient: Tensor, indices: Tensor = indices) -> None:
            rows[name][indices] = gradient.float()

        backpropagate(take)
    lengths = sum(own.flatten(1).square().sum(1) for own in rows.values())
    assert isinstance(lengths, Tensor)
    return {name: own / lengths.sqrt()[:, None, None] for name, own in rows.items()}


def one_sided(gradients: Blocks, dimension: int, seed: int = 0) -> Tensor:
    """Return products with random signs of the long side alone; the side of length r stays."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for own in gradients.values():
        long = own if own.shape[2] >= own.shape[1] else own.transpose(1, 2)
        width = max(1, dimension // len(gradients) // long.shape[1])
        parts.append((long @ _signs(generator, long.shape[2], width) / width**0.5).flatten(1))
    return torch.cat(parts, 1)


def two_sided(gradients: Blocks, dimension: int, seed: int = 0) -> Tensor:
    """Return L ∇ R of every block, both sides about as wide."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for own in gradients.values():
        budget = dimension // len(gradients)
        left = max(1, min(own.shape[1], own.shape[2], int(budget**0.5)))
        right = max(1, budget // left)
        sides = _signs(generator, left, own.shape[1]), _signs(generator, own.shape[2], right)
        parts.append((sides[0] @ own @ sides[1] / (left * right) ** 0.5).flatten(1))
    return torch.cat(parts, 1)


def dense_signs(gradients: Blocks, dimension: int, seed: int = 0) -> Tensor:
    """Return products of every block with dense random signs."""
    generator, width, parts = torch.Generator().manual_seed(seed), dimension // len(gradients), []
    for own in gradients.values():
        flat = own.flatten(1)
        parts.append(flat @ _signs(generator, flat.shape[1], width) / width**0.5)
    return torch.cat(parts, 1)


def subsampled_hadamard(gradients: Blocks, dimension: int, seed: int = 0) -> Tensor:
    """Return some entries of H D g of the whole gradient: D random signs, H Hadamard's matrix."""
    flat = torch.cat([own.flatten(1) for own in gradients.values()], 1)
    generator = torch.Generator().manual_seed(seed)
    size = 2 ** (flat.shape[1] - 1).bit_length()
    kept = torch.randperm(size, generator=generator)[:dimension]
    signs, inner = _signs(generator, 1, flat.shape[1])[0], 1024
    small, found = torch.from_numpy(hadamard(inner)).float(), []
    for part in flat.split(64):
        padded = torch.zeros(len(part), size)
        padded[:, : flat.shape[1]] = part * signs
        rest = padded.view(len(part), size // inner, inner) @ small
        rest = rest.transpose(1, 2).contiguous()
        width = 1
        while width < rest.shape[2]:  # butterflies along the other factor
            pairs = rest.view(*rest.shape[:2], -1, 2, width)
            rest = torch.stack(
                [pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2
            ).view(rest.shape)
            width *= 2
        found.append(rest.reshape(len(part), -1)[:, kept])
    return torch.cat(found) / dimension**0.5


WAYS = {
    "signs on the long side": one_sided,
    "two-sided": two_sided,
    "dense signs": dense_signs,
    "subsampled Hadamard": subsampled_hadamard,
}


def main(run: Path, num_pool: int, dimensions: list[int]) -> None:
    """Print a row for each way, number format and dimension."""
    config = read_config(run)
    job = open_job(RunStages.of(config).inputs, Run(run))
    model = job.models.with_adapter(job.checkpoints()[-1].path)
    drawn = np.random.default_rng(1).permutation(len(job.pool))
    pool = whole_gradients(model, job.pool.examples(np.sort(drawn[:num_pool])))
    sample = job.pool.examples(np.sort(drawn[num_pool : num_pool + config.index.samples]))
    targets = {n: whole_gradients(model, t.examples(range(len(t)))) for n, t in job.targets.items()}
    print_row("numbers", "bytes", "way", "off by", *(f"{n}: Spearman, Jaccard" for n in targets))
    for dimension in dimensions:
        for way, sketch in WAYS.items():
            found = sketch(pool, dimension), {n: sketch(t, dimension) for n, t in targets.items()}
            report(f"{way}, halves", 2, found[0].half().float(), found[1], pool, targets)
        with tempfile.TemporaryDirectory() as scratch:
            given = config.model_copy(
                update={"index": config.index.model_copy(update={"dimension": dimension})}
            )
            fit_sketch(model, sample, given, Path(scratch) / "s", lambda _: None)
            numbers = load_sketch(model, Path(scratch) / "s").numbers
        ours = [
            torch.cat([own[n].flatten(1) @ numbers[n].float().T for n in numbers], 1)
            for own in (pool, *targets.values())
        ]
        of_targets = dict(zip(targets, ours[1:], strict=True))
        rows, steps = quantize(ours[0])
        report("directions and signs, halves", 2, ours[0].half().float(), of_targets, pool, targets)
        rounded = rows.float() * steps[:, None]
        report("directions and signs, bytes", 1, rounded, of_targets, pool, targets)


def report(
    way: str,
    size: int,
    pool: Tensor,
    sketched: Mapping[str, Tensor],
    exact_pool: Blocks,
    exact_targets: Mapping[str, Blocks],
) -> None:
    """Print how near sketches come to the gradients."""
    errors, cells = [], []
    for name, own in exact_targets.items():
        exact = sum(exact_pool[n].flatten(1) @ own[n].flatten(1).T for n in own)
        gram = sum(own[n].flatten(1) @ own[n].flatten(1).T for n in own)
        assert isinstance(exact, Tensor)
        assert isinstance(gram, Tensor)
        subspace = fit_subspace(gram.double().numpy(), "auto")
        found = pool @ sketched[name].T
        errors.append((found - exact).square().mean().item())
        scores = [_gist(products, subspace) for products in (exact, found)]
        cells.append(f"{spearmanr(*scores).statistic:.3f}, {_jaccard(*scores):.2f}")
    print_row(pool.shape[1], size * pool.shape[1], way, f"{np.mean(errors) ** 0.5:.4f}", *cells)


def _gist(products: Tensor, subspace: Subspace) -> np.ndarray:
    """Return the cosine with the nearest target example, inside the target's subspace."""
    own, target = products.numpy() @ subspace.combination, subspace.coordinates
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    return (own @ (target / np.linalg.norm(target, axis=1, keepdims=True)).T).max(1)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    count = len(one) // 20
    best = [{*np.argsort(-scores)[:count]} for scores in (one, other)]
    return len(best[0] & best[1]) / len(best[0] | best[1])


def _signs(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randint(0, 2, (rows, columns), generator=generator).float() * 2 - 1


def print_row(*cells: object) -> None:
    """Print a row of a table at once."""
    sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--pool", type=int, default=2000)
    parser.add_argument("--dimension", type=int, action="append")
    arguments = parser.parse_args()
    main(arguments.run, arguments.pool, arguments.dimension or [1024, 4096, 8192])

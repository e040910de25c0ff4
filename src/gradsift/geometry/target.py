"""What is measured of one target at one adapter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from gradsift.config import Config, EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.geometry.config import GeometryConfig
from gradsift.gradients.basis import Basis, fitting_basis
from gradsift.gradients.distinct import distinct_examples, merge_rows
from gradsift.gradients.gram import fitting_gram
from gradsift.gradients.hessian import (
    Hessian,
    check_eigenvectors,
    entries,
    leading_eigenpairs,
    measure_coupling,
    sines,
)
from gradsift.gradients.lanczos import lanczos_bytes
from gradsift.gradients.memory import memory_budget
from gradsift.gradients.per_example import blocks
from gradsift.gradients.subspace import Subspace, describe, fit_subspace
from gradsift.models.batch_size import start_tokens, within_memory
from gradsift.models.batches import device_of, lengths_of
from gradsift.progress import track

logger = logging.getLogger(__name__)

_TOKENS = 1024  # per batch: a graph of the backward pass is kept for each
_ENTRIES = 16  # of A and of B, in the picture of one layer


def measure_target(
    model: nn.Module,
    name: str,
    target: EncodedSet,
    config: Config,
    settings: GeometryConfig,
    coupling: bool,
) -> dict[str, Any]:
    """Return spectrum and subspace of a target's gradients beside its Hessian, as plain values.

    Raises:
        NumericsError: If a gradient is not finite, or none differs from zero.
        ConfigError: If so many eigenvectors cannot be looked for.
    """
    rank, engine = config.gist.rank, config.engine
    num_parameters = sum(map(prod, blocks(model).values()))
    memory = memory_budget(engine, device_of(model))
    check_eigenvectors(settings.eigenvectors, num_parameters, memory)
    rng = np.random.default_rng(settings.seed)
    count = min(settings.examples, len(target))
    rows = np.sort(rng.choice(len(target), size=count, replace=False))
    everything = _fit(model, *distinct_examples(target), rank, engine)
    examples, inverse = distinct_examples(target, rows)
    subspace = _fit(model, examples, inverse, rank, engine)
    weights = np.bincount(inverse, minlength=len(examples)) / len(inverse)
    kept = lanczos_bytes(settings.eigenvectors, num_parameters)
    hessian = _fitting_hessian(model, examples, weights, engine, kept if kept <= memory else 0)
    logger.info("%s: looking for %d eigenvectors of the Hessian", name, settings.eigenvectors)
    pairs = leading_eigenpairs(hessian, settings.eigenvectors, settings.seed, memory)
    # after them, so that it is not in memory beside the vectors of Lanczos' method
    merged = merge_rows(subspace.combination, inverse, len(examples))
    # half of what was free, not all: products with the Hessian need more beside it than a pass
    bounded = config.model_copy(update={"engine": engine.model_copy(update={"memory": memory})})
    basis = fitting_basis(model, [(examples, merged)], bounded)
    found = {"spectrum": describe(everything)}
    found["hessian"] = {"num_examples": count} | _compare(hessian, pairs, basis, subspace)
    if coupling:
        found["coupling"] = {"num_examples": count} | _couple(hessian, name, settings)
    return found


def _fitting_hessian(
    model: nn.Module,
    examples: Sequence[Encoded],
    weights: Float[np.ndarray, " example"],
    engine: EngineConfig,
    kept: int,
) -> Hessian:
    """Return the Hessian in batches that fit: on a GPU a product is tried beside `kept` bytes.

    Raises:
        ModelError: If a single example does not fit.
    """
    device = device_of(model)

    def build(max_tokens: int) -> Hessian:
        hessian = Hessian(model, examples, weights, max_tokens)
        if device.type == "cuda":
            beside = torch.empty(kept, dtype=torch.uint8, device=device)
            hessian(torch.ones(1, hessian.size, device=device))
            del beside
        return hessian

    return within_memory(build, min(_TOKENS, start_tokens(engine, device)), lengths_of(examples))[0]


def _fit(
    model: nn.Module,
    examples: Sequence[Encoded],
    inverse: np.ndarray,
    rank: int | str,
    engine: EngineConfig,
) -> Subspace:
    gram = fitting_gram(model, examples, engine)[np.ix_(inverse, inverse)]
    if isinstance(rank, int):  # the examples drawn may span fewer directions than all of them
        rank = min(rank, fit_subspace(gram, "full").rank)
    return fit_subspace(gram, rank)


def _compare(
    hessian: Hessian, pairs: tuple[np.ndarray, np.ndarray], basis: Basis, subspace: Subspace
) -> dict[str, Any]:
    """Return the leading eigenvalues, and how the subspace lies to their eigenvectors."""
    values, vectors = pairs
    inside = _inside(hessian, basis, vectors)
    ranks = sorted({r for r in (1, 2, 5, 10, 20, 50, 100, 200) if r < subspace.rank})
    return {
        "num_parameters": hessian.size,
        "rank": subspace.rank,
        "eigenvalues": values.tolist(),
        "captured": (inside**2).sum(axis=0).tolist(),
        "angles": [_angles(inside, rank) for rank in [*ranks, subspace.rank]],
    }


def _inside(
    hessian: Hessian, basis: Basis, vectors: Float[np.ndarray, "vector parameter"]
) -> Float[np.ndarray, "direction vector"]:
    """Return the coordinates of some vectors in the basis."""
    total = np.zeros((basis.rank, len(vectors)))
    for name, own in hessian.slices.items():
        block = basis[name]
        part = torch.from_numpy(vectors[:, own]).to(block.device, torch.float32)
        total += (block.float() @ part.T).cpu().numpy()
    return total


def _angles(inside: Float[np.ndarray, "direction vector"], rank: int) -> dict[str, Any]:
    """Return how the first directions lie to as many eigenvectors, or to all that there are."""
    count = min(rank, inside.shape[1])
    found = sines(inside[:rank, :count])
    return {
        "rank": rank,
        "eigenvectors": count,
        "largest_sine": float(found[0]),
        "rms_sine": float(np.sqrt(np.mean(found**2))),
    }


def _couple(hessian: Hessian, name: str, settings: GeometryConfig) -> dict[str, Any]:
    """Return where the Hessian's mass lies, and part of the layer with most between A and B."""
    with track(f"{name}: coupling", len(hessian.slices), "matrices") as advance:
        coupling = measure_coupling(hessian, settings.probes, settings.seed, advance)
    names, masses = [*hessian.slices], coupling.masses
    between = {
        layer: float(masses[names.index(f"{layer}.A"), names.index(f"{layer}.B")])
        for layer in coupling.layers
    }
    chosen = max(between, key=lambda layer: between[layer])
    matrix, labels = entries(hessian, chosen, _ENTRIES)
    return {
        "off_diagonal": asdict(coupling.off_diagonal),
        "cross": asdict(coupling.cross),
        "between_layers": asdict(coupling.between_layers),
        "layers": {layer: asdict(found) for layer, found in coupling.layers.items()},
        "blocks": names,
        "masses": masses.tolist(),
        "entries": {"layer": chosen, "labels": labels, "matrix": matrix.tolist()},
    }

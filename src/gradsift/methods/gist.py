"""GIST: score by cosine inside the subspace of the target's gradients.

Min, Huang, Wan, Chen: Gradient Isometric Subspace Transformation, ICML 2026, arXiv 2602.18584.
Target gradients give a subspace per target; one pass over the pool projects every example's
gradient on the subspaces of all targets at once; coordinates are compared by cosine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from gradsift.config import Config, GistConfig
from gradsift.data import Encoded, EncodedSet
from gradsift.scores import Alignment, View
from gradsift.shards import (
    batch_tokens_of,
    directory_of,
    load_pool,
    measure_shards,
    not_finite,
    plan_shards,
)
from gradsift.store import write_atomically
from gradsift.subspace import Subspace, fit_subspace, rank_of_share
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from peft import PeftModel

    from gradsift.basis import Basis

logger = logging.getLogger(__name__)

ModelAt = Callable[[Checkpoint], "PeftModel"]
"""Gives the model with a checkpoint's adapter, valid until it is asked for another."""


def measure_subspaces(
    config: Config,
    target: EncodedSet,
    checkpoints: Sequence[Checkpoint],
    directory: Path,
    model_at: ModelAt,
) -> None:
    """Leave each checkpoint's subspace of a target, and `spectrum.json`, in `directory`.

    Raises:
        NumericsError: If a gradient is not finite or the rank asked for is not there.
    """
    from gradsift.memory import fitting_gram

    examples, inverse = _distinct(target.examples(range(len(target))))
    spectra = {}
    for checkpoint in checkpoints:
        model = model_at(checkpoint)
        gram = fitting_gram(model, examples, config.engine)[np.ix_(inverse, inverse)]
        broken = np.flatnonzero(~np.isfinite(np.diag(gram)))
        if len(broken):
            raise not_finite(f"gradient of the target {directory.name!r}", target, broken)
        subspace = fit_subspace(gram, config.gist.rank, str(model.dtype).removeprefix("torch."))
        if subspace.rank == 1 and not config.gist.norm_power:
            logger.warning(
                "%s has a single direction: every score is 1 or -1 and the pool's order decides; "
                "give more target examples or set gist.norm_power=1",
                directory.name,
            )
        _save_subspace(subspace, directory / f"{checkpoint.label}.safetensors")
        spectra[checkpoint.label] = _spectrum(subspace)
        logger.info(
            "%s at %s: rank %d of %d examples",
            directory.name,
            checkpoint.label,
            subspace.rank,
            len(target),
        )
    write_atomically(directory / "spectrum.json", json.dumps(spectra, indent=1).encode())


def project_pool(
    config: Config,
    pool: EncodedSet,
    targets: Mapping[str, EncodedSet],
    checkpoints: Sequence[Checkpoint],
    run: Path,
    model_at: ModelAt,
) -> None:
    """Leave coordinates, losses and gradient norms of the whole pool, shard by shard.

    One pass serves all targets: their bases are stacked. A shard that is there is not done again.

    Raises:
        NumericsError: Naming the first example whose loss or gradient is not finite.
    """
    from gradsift.memory import find_batch_tokens

    for checkpoint in checkpoints:
        directory = directory_of(run, checkpoint)
        directory.mkdir(parents=True, exist_ok=True)
        shards = plan_shards(len(pool), config.engine.shard_size, directory)
        stored = [shard for shard in shards if shard.path.exists()]
        missing = [shard for shard in shards if shard not in stored]
        if not missing:
            continue
        subspaces = {name: load_subspace(run, name, checkpoint) for name in targets}
        ranks = {name: subspace.rank for name, subspace in subspaces.items()}
        model = model_at(checkpoint)
        basis = _stacked_basis(config, model, targets, subspaces)
        if stored:
            logger.info("%d of %d shards are there already", len(stored), len(shards))
        if stored and config.engine.batch_tokens == "auto":
            max_tokens = batch_tokens_of(stored[-1])
        else:
            lengths = pool.table(["num_tokens"])["num_tokens"].to_numpy()
            max_tokens = find_batch_tokens(model, basis, lengths, config.engine)
        measure_shards(model, pool, missing, basis, ranks, max_tokens)
        del basis  # before the next is built beside it


def align(
    config: GistConfig,
    run: Path,
    name: str,
    target: EncodedSet,
    checkpoints: Sequence[Checkpoint],
) -> Alignment:
    """Return how the pool aligns with a target, from what is stored."""
    views = []
    for checkpoint in checkpoints:
        stored = load_pool(run, checkpoint, (f"coordinates/{name}", "gradient_norm"))
        references = load_subspace(run, name, checkpoint).coordinates.astype(np.float32)
        coordinates, norms = stored[f"coordinates/{name}"], stored["gradient_norm"]
        views.append(View(coordinates, norms, references, checkpoint.weight))
    return Alignment(views, target.table(["task"])["task"].to_pylist(), config)


def load_subspace(run: Path, name: str, checkpoint: Checkpoint) -> Subspace:
    """Return a stored subspace."""
    tensors = load_file(run / "targets" / name / f"{checkpoint.label}.safetensors")
    return Subspace(tensors["combination"], tensors["coordinates"], tensors["singular_values"])


def _save_subspace(subspace: Subspace, path: Path) -> None:
    tensors = {
        "combination": np.ascontiguousarray(subspace.combination),
        "coordinates": np.ascontiguousarray(subspace.coordinates),
        "singular_values": np.ascontiguousarray(subspace.singular_values),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def _spectrum(subspace: Subspace) -> dict[str, Any]:
    sigma = subspace.singular_values
    return {
        "num_examples": len(sigma),
        "rank": subspace.rank,
        "r95": rank_of_share(sigma, 0.95),
        "r99": rank_of_share(sigma, 0.99),
        "singular_values": sigma.tolist(),
        "cumulative_variance": (np.cumsum(sigma**2) / (sigma**2).sum()).tolist(),
    }


def _distinct(examples: Sequence[Encoded]) -> tuple[list[Encoded], np.ndarray]:
    """Return the different examples, and for each example which of them it is.

    Equal examples have equal gradients: they are computed once, so that no rounding tells them
    apart and blows up the difference into a direction.
    """
    places: dict[tuple[bytes, bytes], int] = {}
    keys = [(e.input_ids.tobytes(), e.supervised.tobytes()) for e in examples]
    inverse = np.array([places.setdefault(key, len(places)) for key in keys])
    first = [int(np.flatnonzero(inverse == i)[0]) for i in range(len(places))]
    return [examples[i] for i in first], inverse


def _stacked_basis(
    config: Config,
    model: PeftModel,
    targets: Mapping[str, EncodedSet],
    subspaces: Mapping[str, Subspace],
) -> Basis:
    """Return the bases of all targets, one below the other, block by block.

    Raises:
        ModelError: If they do not fit into memory.
    """
    from gradsift.memory import fitting_basis

    parts = []
    for name, target in targets.items():
        examples, inverse = _distinct(target.examples(range(len(target))))
        combination = np.zeros((len(examples), subspaces[name].rank))
        np.add.at(combination, inverse, subspaces[name].combination)
        parts.append((examples, combination))
    return fitting_basis(model, parts, config.engine)

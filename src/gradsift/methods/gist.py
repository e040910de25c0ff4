"""GIST: score by cosine inside the subspace of the target's gradients.

Min, Huang, Wan, Chen: Gradient Isometric Subspace Transformation, ICML 2026, arXiv 2602.18584.
Target gradients give a subspace per target; one pass over the pool projects every example's
gradient on the subspaces of all targets at once; coordinates are compared by cosine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gradsift.config import Config, GistConfig
from gradsift.data import Encoded, EncodedSet
from gradsift.errors import NumericsError, RunError
from gradsift.progress import track
from gradsift.scores import Alignment, View
from gradsift.store import write_atomically
from gradsift.subspace import Subspace, fit_subspace, rank_of_share
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A fixed range of the pool and the file that holds its results."""

    start: int
    stop: int
    path: Path


def plan_shards(num_examples: int, size: int, directory: Path) -> list[Shard]:
    """Return the ranges that the pool is cut into, the same for every run and worker."""
    return [
        Shard(start, min(start + size, num_examples), directory / f"{start:010d}.safetensors")
        for start in range(0, num_examples, size)
    ]


def measure_subspaces(
    config: Config, target: EncodedSet, checkpoints: Sequence[Checkpoint], directory: Path
) -> None:
    """Leave each checkpoint's subspace of a target, and `spectrum.json`, in `directory`.

    Raises:
        NumericsError: If a gradient is not finite or the rank asked for is not there.
    """
    from gradsift.gradients import gram_matrix

    examples, inverse = _distinct(target.examples(range(len(target))))
    spectra = {}
    for checkpoint in checkpoints:
        model = _load_model(config, checkpoint)
        gram = gram_matrix(model, examples, config.engine.batch_tokens)
        dtype = str(model.dtype).removeprefix("torch.")
        gram = gram[np.ix_(inverse, inverse)]
        broken = np.flatnonzero(~np.isfinite(np.diag(gram)))
        if len(broken):
            raise _not_finite(f"gradient of the target {directory.name!r}", target, broken)
        subspace = fit_subspace(gram, config.gist.rank, dtype)
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
) -> None:
    """Leave coordinates, losses and gradient norms of the whole pool, shard by shard.

    One pass serves all targets: their bases are stacked. A shard that is there is not done again.

    Raises:
        NumericsError: Naming the first example whose loss or gradient is not finite.
    """
    for checkpoint in checkpoints:
        directory = run / "coordinates" / checkpoint.label
        directory.mkdir(parents=True, exist_ok=True)
        shards = plan_shards(len(pool), config.engine.shard_size, directory)
        missing = [shard for shard in shards if not shard.path.exists()]
        if not missing:
            continue
        if len(missing) < len(shards):
            logger.info(
                "%d of %d shards are there already", len(shards) - len(missing), len(shards)
            )
        subspaces = {name: load_subspace(run, name, checkpoint) for name in targets}
        total = sum(shard.stop - shard.start for shard in missing)
        ranks = {name: subspace.rank for name, subspace in subspaces.items()}
        model = _load_model(config, checkpoint)
        basis = _stacked_basis(config, model, targets, subspaces)
        with track(f"pool at {checkpoint.label}", total) as advance:
            for shard in missing:
                tensors = _project_shard(config, model, pool, shard, basis)
                tensors |= _split(tensors.pop("coordinates"), ranks)
                write_atomically(shard.path, partial(save_file, tensors))
                advance(shard.stop - shard.start)


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


def load_pool(
    run: Path, checkpoint: Checkpoint, names: Sequence[str]
) -> dict[str, Float[np.ndarray, "..."]]:
    """Return what the pool pass stored under these names, for the whole pool."""
    paths = sorted((run / "coordinates" / checkpoint.label).glob("*.safetensors"))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in paths:
        with safe_open(path, "np") as shard:
            for name, part in parts.items():
                part.append(shard.get_tensor(name))
    stored = {name: np.concatenate(part) for name, part in parts.items()}
    num_pool = len(EncodedSet(run / "data" / "pool.parquet"))
    if any(len(values) != num_pool for values in stored.values()):
        raise RunError(
            f"shards are missing in {paths[0].parent}; remove manifests/coordinates.json in {run} "
            "and run the same command: what is there is kept"
        )
    return stored


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


def _load_model(config: Config, checkpoint: Checkpoint) -> PeftModel:
    from gradsift.model import load_adapter, load_base

    return load_adapter(load_base(config.model), checkpoint.path)


def _stacked_basis(
    config: Config,
    model: PeftModel,
    targets: Mapping[str, EncodedSet],
    subspaces: Mapping[str, Subspace],
) -> dict[str, Tensor]:
    """Return the bases of all targets, one below the other, block by block."""
    import torch

    from gradsift.gradients import combine_rows

    bases = []
    for name, target in targets.items():
        examples, inverse = _distinct(target.examples(range(len(target))))
        combination = np.zeros((len(examples), subspaces[name].rank))
        np.add.at(combination, inverse, subspaces[name].combination)
        bases.append(combine_rows(model, examples, combination, config.engine.batch_tokens))
    return {block: torch.cat([basis.pop(block) for basis in bases]) for block in [*bases[0]]}


def _project_shard(
    config: Config,
    model: PeftModel,
    pool: EncodedSet,
    shard: Shard,
    basis: Mapping[str, Tensor],
) -> dict[str, np.ndarray]:
    from gradsift.gradients import project

    rows = np.arange(shard.start, shard.stop)
    found = project(model, pool.examples(rows), basis, config.engine.batch_tokens)
    tensors = {
        "coordinates": found.coordinates.numpy(),
        "loss": found.losses.numpy(),
        "gradient_norm": found.gradient_norms.numpy(),
    }
    for what, values in tensors.items():
        broken = np.flatnonzero(~np.isfinite(values.reshape(len(rows), -1)).all(axis=1))
        if len(broken):
            raise _not_finite(f"{what.replace('_', ' ')} of the pool", pool, rows[broken])
    return tensors


def _not_finite(what: str, encoded: EncodedSet, rows: np.ndarray) -> NumericsError:
    where = encoded.take(rows[:1], ["id", "file", "line"]).to_pylist()[0]
    return NumericsError(
        f"the {what} is not finite for {len(rows)} examples, the first being {where['id']!r} "
        f"({where['file']}:{where['line']}); is the adapter broken? Try model.dtype=float32"
    )


def _split(
    coordinates: Float[np.ndarray, "example rank"], ranks: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Return each target's own columns of the stacked coordinates."""
    ends = np.cumsum([*ranks.values()])
    parts = np.split(coordinates, ends[:-1], axis=1)
    return {
        f"coordinates/{name}": np.ascontiguousarray(part)
        for name, part in zip(ranks, parts, strict=True)
    }

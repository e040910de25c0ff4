"""Sentence embeddings: cosine with the most alike target example, by sentence-transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradsift.config import Config
from gradsift.errors import ConfigError, check_installed
from gradsift.methods.base import Method
from gradsift.methods.job import Inputs, Job
from gradsift.methods.measurement import Measurement
from gradsift.models.identity import identity
from gradsift.pool.examples import check_finite
from gradsift.pool.shards import save_shard
from gradsift.progress import track
from gradsift.runs import layout
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]
_EMBEDDINGS = Measurement(layout.EMBED)


def stages(inputs: Inputs) -> tuple[Stage, ...]:
    """Return the embeddings of targets and pool."""
    encoder = {
        "name": inputs.config.embed.model,
        "identity": identity(inputs.config.embed.model),
        "trust_remote_code": inputs.config.model.trust_remote_code,
    }
    return _EMBEDDINGS.stages(inputs, encoder=encoder)


def check(config: Config) -> None:
    """Find out whether the library is there.

    Raises:
        ConfigError: If it is not, or if the work was to be spread over machines.
    """
    check_installed("sentence_transformers", "method=embed", "embed")
    if config.engine.executor != "local":
        raise ConfigError("method=embed runs in one process alone: leave --engine ray out for it")


def measure(job: Job) -> None:
    """Store the embeddings of targets and pool.

    Raises:
        ModelError: If the encoder cannot be loaded.
    """
    *targets, pool = stages(job.inputs)
    encode: Encode | None = None
    for name, stage in zip(job.targets, targets, strict=True):
        with job.folder.stage(stage) as todo:
            if todo:
                encode = encode or _load_sentence_encoder(job.config)
                embedding = encode(job.texts(job.targets[name]))
                _EMBEDDINGS.save_target(job, name, {"embedding": embedding})
    with _EMBEDDINGS.pool_pass(job).open(pool) as todo:
        if todo:
            _embed_pool(job, encode or _load_sentence_encoder(job.config))


def scores(job: Job) -> dict[str, Alignment]:
    """Return the largest cosine with a target example."""
    return _EMBEDDINGS.nearest_cosines(job, "embedding")


METHOD = Method(scores, stages, measure, check=check)


def _embed_pool(job: Job, encode: Encode) -> None:
    pool_pass = _EMBEDDINGS.pool_pass(job)
    missing = pool_pass.missing(pool_pass.shards())
    with track("embedding the pool", sum(map(len, missing))) as advance:
        for shard in missing:
            rows = np.arange(shard.start, shard.stop)
            tensors = {"embedding": encode(job.texts(job.pool, rows))}
            check_finite(tensors, "of the pool", job.pool, shard.start)
            shard.path.parent.mkdir(parents=True, exist_ok=True)
            save_shard(shard, tensors)
            job.folder.publish(shard.path)
            advance(len(shard))


def _load_sentence_encoder(config: Config) -> Encode:
    """Return what turns texts into embeddings of length 1.

    Raises:
        ModelError: If the encoder cannot be loaded.
    """
    from sentence_transformers import (  # pyright: ignore[reportMissingImports]
        SentenceTransformer,
    )

    from gradsift.models.devices import use_device
    from gradsift.models.files import refuse_pickled_weights, translate_load_errors

    for path in [Path(config.embed.model), *Path(config.embed.model).glob("*/")]:
        refuse_pickled_weights(path, f"the encoder {config.embed.model!r}")
    with translate_load_errors(f"the encoder {config.embed.model!r}"):
        model = SentenceTransformer(
            config.embed.model,
            device=str(use_device(config.model)),
            trust_remote_code=config.model.trust_remote_code,
            model_kwargs={"use_safetensors": True},
        )
    logger.info(
        "%s reads the first %s tokens of each text", config.embed.model, model.max_seq_length
    )

    def encode(texts: list[str]) -> np.ndarray:
        found = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)

    return encode

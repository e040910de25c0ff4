"""The side of gradsift in `peers.py`: coordinates along the queries' gradients, and norms."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from gradsift.config import EngineConfig
from gradsift.data.encoding import Encoded
from gradsift.gradients.basis import Basis
from gradsift.gradients.per_example import gradient_rows
from gradsift.gradients.projection import project
from gradsift.models.adapters import load_adapter
from gradsift.models.batch_size import find_batch_tokens
from gradsift.models.batches import lengths_of
from peers_job import Clock, Job


def encoded(job: Job, name: str) -> list[Encoded]:
    """Return the rows as gradsift holds them."""
    return [
        Encoded(np.array(row["input_ids"], np.int32), np.array(row["labels"]) != -100)
        for row in job.rows(name)
    ]


def main(folder: Path) -> None:
    """Measure the pool; the basis is the queries' gradients as they are, not orthonormalised."""
    warnings.filterwarnings("ignore", ".*is deprecated and will be removed", FutureWarning)
    disable_progress_bar()
    job, clock = Job(folder), Clock()
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    model = load_adapter(base.requires_grad_(False).eval(), job.adapter)
    pool, queries = encoded(job, "pool"), encoded(job, "queries")
    rows = gradient_rows(model, queries, 2048)
    query_norms = torch.stack([(row.square()).sum(1) for row in rows.values()]).sum(0).sqrt()
    basis = Basis(rows, frozenset(), model.device)
    tokens = find_batch_tokens(
        partial(project, model, basis=basis), lengths_of(pool), EngineConfig(), model.device
    )
    clock.start()
    found = project(model, pool, tokens, basis)
    seconds = clock.seconds
    cosines = found.coordinates / found.gradient_norms[:, None] / query_norms
    job.write("gradsift", cosines.numpy(), seconds, batch_tokens=tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The side of bergson 2.5.1 in `peers.py`; runs in an environment that has bergson.

What the workers of `bergson build` (the queries, once) and `bergson score` (the pool) do, with its
own loading of model and adapter, batches by tokens, hooks, scorer and files. `unit_normalize` makes
scores cosines, so that it forms norms as gradsift does.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from bergson.collection import collect_gradients
from bergson.config import IndexConfig, PreprocessConfig, ScoreConfig
from bergson.data import allocate_batches, load_scores
from bergson.score.score import create_scorer
from bergson.utils.worker_utils import create_processor, setup_model_and_peft
from datasets import Dataset

from peers_job import Clock, Job


def configure(job: Job, name: str, tokens: int) -> IndexConfig:
    """Return the settings of one pass: whole gradients of LoRA, of each example's mean loss."""
    config = IndexConfig(
        run_path=str(job.folder / "bergson" / name),
        model=str(job.adapter),
        precision="fp32",
        projection_dim=0,
        token_batch_size=tokens,
        loss_reduction="mean",
    )
    shutil.rmtree(config.partial_run_path, ignore_errors=True)
    config.partial_run_path.mkdir(parents=True)
    return config


def warm_up(model: torch.nn.Module, tokens: list[int]) -> None:
    """Do once what takes longer the first time."""
    model(torch.tensor([tokens])).logits.sum().backward()
    model.zero_grad()


def main(folder: Path, tokens: int, name: str = "pool") -> None:
    """Score the `pool` by cosine with the stored `queries`, or store those."""
    job, clock = Job(folder), Clock()
    config = configure(job, name, tokens)
    path = config.partial_run_path
    model, modules = setup_model_and_peft(config)
    rows = [{**row, "length": len(row["input_ids"])} for row in job.rows(name)]
    dataset, scorer = Dataset.from_list(rows), None
    processor = create_processor(model, config, modules)
    batches = allocate_batches(dataset["length"][:], tokens)
    if name == "pool":
        scorer = create_scorer(
            path,
            dataset,
            ScoreConfig(query_path=str(path.with_name("queries.part"))),
            PreprocessConfig(unit_normalize=True),
            model.device,
            torch.float32,
        )
    warm_up(model, rows[0]["input_ids"])
    clock.start()
    collect_gradients(
        model,
        dataset,
        processor,
        config,
        batches=batches,
        target_modules=modules,
        scorer=scorer,
    )
    if scorer:
        scorer.writer.flush()
        seconds = clock.seconds
        job.write("bergson", np.asarray(load_scores(path)[:]), seconds, batch_tokens=tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])

"""The side of dattri-llm 0.1.0 in `peers.py`; runs in an environment that has dattri_llm.

`TracInAttributor.attribute` on the fly, the queries first and held; the clock starts when it asks
for the first pool batch. `normalized_grad` makes scores cosines: it forms norms, as gradsift does.
Of its ways to capture the fastest: `invasive_linear_io`, which leaves out the sums over the batch
that autograd would form, with factorized gradients. It takes batches of so many examples; here they
have so many tokens, of like length, laid out beforehand, by the `collate_fn` of its streamer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    GradientStreamer,
    HookManagerConfig,
    TracInAttributor,
)
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from peers_job import Clock, Job, Row, batches_of


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Whole batches in place of examples; asking for the first starts the clock."""

    def __init__(self, rows: Sequence[Row], tokens: int, clock: Clock | None = None) -> None:
        self.groups = batches_of(rows, tokens)
        self._rows, self._clock = rows, clock

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self._clock:
            self._clock.start()
        rows = [self._rows[i] for i in self.groups[index]]
        return {
            "input_ids": padded([row["input_ids"] for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], -100),
        }


def padded(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Return (example, token)."""
    longest = max(map(len, sequences))
    return torch.tensor([[*own, *[value] * (longest - len(own))] for own in sequences])


class Attributor(TracInAttributor):
    """TracIn that takes batches as they are laid out."""

    def generate_train_rep(self, train_dataset: Batches, **given: Any) -> GradientStreamer:
        """Stream the pool."""
        return self._stream(train_dataset, **given)

    def generate_test_rep(self, test_dataset: Batches, **given: Any) -> GradientStreamer:
        """Stream the queries."""
        return self._stream(test_dataset, **given)

    def _stream(self, dataset: Batches, hook_config: Any = None, **given: Any) -> GradientStreamer:
        return GradientStreamer(
            self.task.model,
            dataset,
            self.args,
            batch_size=1,
            loss_fn=self.task.loss_func,
            collate_fn=lambda batches: batches[0],
            config=hook_config,
            **given,
        )


def summed_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum of the examples' mean losses, so that each gradient is its example's own."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses.view_as(labels).sum(1) / (labels != -100).sum(1)).sum()


def main(folder: Path, tokens: int) -> None:
    """Score the pool by cosine with the queries."""
    job, clock = Job(folder), Clock()
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(job.adapter), is_trainable=True).eval()
    pool = Batches(job.rows("pool"), tokens, clock)
    queries = Batches(job.rows("queries"), tokens)
    arguments = AttributionArguments(output_dir=str(job.folder / "dattri-llm"), use_cpu=True)
    score = Attributor(arguments, task=AttributionTask(summed_losses, model)).attribute(
        pool,
        queries,
        hook_config=HookManagerConfig(invasive_linear_io=[r"lora_[AB]"]),
        normalized_grad=True,
    )
    seconds = clock.seconds
    cosines = np.empty(score.scores.shape)  # rows and columns come as they were streamed
    cosines[np.ix_(np.concatenate(pool.groups), np.concatenate(queries.groups))] = score.scores
    job.write("dattri-llm", cosines, seconds, batch_tokens=tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

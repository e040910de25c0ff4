"""How fast each kind of a method's work goes here, tried on a sample at the true sizes.

A trial takes seconds; `forecast.py` says what the whole work will take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.config import EngineConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.errors import NumericsError
from gradsift.gradients.subspace import fit_subspace
from gradsift.methods.job import Job
from gradsift.methods.less import adam_direction
from gradsift.methods.work import Work
from gradsift.pool.shards import shard_size, window_size

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor, nn

_TARGET_SAMPLE = 128  # examples of each target, from which its rank is guessed
_POOL_SAMPLE = 1024  # examples of the pool, or a window; as many are measured as time allows
_POOL_SECONDS = 10.0
_TRAIN_BATCHES = 8
_PARAMETERS = 1 << 14  # of gradients, in the trial of a random projection

RunBatches = Callable[[Sequence[Encoded], int], object]


@dataclass(frozen=True)
class PoolSpeed:
    """How fast a pass over the pool goes; `device_memory` at its peak, in bytes, 0 on a CPU."""

    tokens_per_second: float
    batch_tokens: int
    device_memory: int


class Trials:
    """Measured speeds, each tried when it is first asked for."""

    def __init__(self, job: Job, scratch: Path) -> None:
        """Take the encoded data, and a folder for an adapter to try things with."""
        self._job, self._scratch = job, scratch
        rng = np.random.default_rng(0)
        self._samples = {
            name: target.examples(rng.permutation(len(target))[:_TARGET_SAMPLE])
            for name, target in job.targets.items()
        }
        self._bases: dict[int, tuple[Any, float]] = {}
        self.pool_speeds: dict[str, PoolSpeed] = {}

    def seconds(self, work: Work) -> float:
        """Return the seconds that a piece of work will take."""
        try_it = {
            "training": self._train,
            "gram": self._gram,
            "basis": self._gather,
            "projection": self._project,
            "random projection": self._project_at_random,
            "forward": self._forward,
        }[work.kind]
        return try_it(work)

    def ranks(self) -> dict[str, int]:
        """Return the rank that each target's subspace is expected to have."""
        from gradsift.models.kernels import precision_of

        wanted, found = self._job.config.gist.rank, {}
        if isinstance(wanted, int):
            return dict.fromkeys(self._samples, wanted)
        dtype = precision_of(self._model)
        for name, gram in self._grams[0].items():
            num_examples, tried = len(self._job.targets[name]), len(gram)
            found[name] = rank = fit_subspace(gram, wanted, dtype).rank
            if num_examples > tried:  # as it grew from half of them, so it is taken to go on
                half = tried // 2
                before = fit_subspace(gram[:half, :half], wanted, dtype).rank
                power = min(max(log2(rank / before), 0.0), 1.0)
                found[name] = min(num_examples, round(rank * (num_examples / tried) ** power))
        return found

    @cached_property
    def adapter(self) -> Path:
        """An adapter as it will be measured: given, fresh, or trained a little."""
        from gradsift.models.adapters import save_adapter

        warmup, path = self._job.config.warmup, self._scratch / "adapter"
        if warmup.adapter is not None:
            return Path(warmup.adapter)
        if warmup.mode == "none":
            with self._job.models.with_fresh_adapter(self._job.config.lora, warmup.seed) as model:
                save_adapter(model, path)
        else:
            _ = self._training  # which leaves it there
        return path

    @cached_property
    def row_bytes(self) -> int:
        """The size of one example's gradient in float32."""
        from gradsift.gradients.gram import row_bytes

        return row_bytes(self._model)

    @cached_property
    def rows_at_once(self) -> int:
        """How many whole gradients are held until they are projected at random; 0: none is."""
        from gradsift.gradients.random_projection import has_kernel
        from gradsift.models.batch_size import start_tokens

        if has_kernel(self._model.device):
            return 0
        engine, num_pool = self._job.config.engine, len(self._job.pool)
        device = self._model.device
        tokens, size = start_tokens(engine, device), shard_size(engine, num_pool)
        window = window_size(engine, size, tokens, device)
        return max(1, min(self._memory // self.row_bytes, window, num_pool))

    @cached_property
    def bytes_of_hidden(self) -> int:
        """What a forward pass keeps of an example: its hidden state in float16 and its loss."""
        from gradsift.models.forward import run_forward

        some = next(iter(self._samples.values()))[:1]
        return 2 * run_forward(self._job.models.base(), some, 1).hidden.shape[1] + 4

    @property
    def _model(self) -> PeftModel:
        return self._job.models.with_adapter(self.adapter)

    @cached_property
    def _memory(self) -> int:
        from gradsift.gradients.memory import memory_budget

        return memory_budget(self._job.config.engine, self._model.device)

    @cached_property
    def _training(self) -> tuple[float, float]:
        """Seconds of a first batch and of each token after it; an adapter is stored."""
        from gradsift.models.adapters import save_adapter
        from gradsift.models.batches import device_of, lengths_of
        from gradsift.models.micro_batches import first_tokens
        from gradsift.models.training import steps_per_epoch, train

        warmup, pool, took = self._job.config.warmup, self._job.pool, []
        rows = np.random.default_rng(warmup.seed).permutation(len(pool))
        with self._job.models.with_fresh_adapter(self._job.config.lora, warmup.seed) as model:
            tokens = first_tokens(warmup.micro_batch_tokens, device_of(model))
            micro = _num_examples(pool, tokens, warmup.batch_size)
            settings = warmup.model_copy(update={"batch_size": micro})
            # a small pool goes round, as in a training of several epochs
            rest = pool.examples(np.resize(rows, micro * (1 + _TRAIN_BATCHES)))
            # what fits the longest is then looked for the first time, and remembered
            rest.insert(0, rest.pop(int(lengths_of(rest).argmax())))
            first = rest[:micro]
            for examples in (first, first, rest):  # the first time pays for what is set up once
                started = time.perf_counter()
                steps = steps_per_epoch(len(examples), settings)
                # in float16 a first step may be skipped; what is wrong shows in the rest too
                with nullcontext() if examples is rest else suppress(NumericsError):
                    train(
                        model, examples, settings, steps=steps, seed=0, label="trying the warm-up"
                    )
                took.append(time.perf_counter() - started)
            save_adapter(model, self._scratch / "adapter")
        further = _num_tokens(rest) - _num_tokens(first)
        return took[1], max(took[2] - took[1], 0) / further

    def _train(self, work: Work) -> float:
        first, per_token = self._training
        return first + per_token * work.num_tokens

    @cached_property
    def _grams(self) -> tuple[dict[str, np.ndarray], float]:
        """The Gram matrix of each target's sample, and the seconds of a token."""
        from gradsift.gradients.gram import fitting_gram

        model, engine, started = self._model, self._job.config.engine, time.perf_counter()
        grams = {name: fitting_gram(model, own, engine) for name, own in self._samples.items()}
        num_tokens = sum(map(_num_tokens, self._samples.values()))
        return grams, (time.perf_counter() - started) / num_tokens

    def _gram(self, work: Work) -> float:
        # where not all rows fit, those after each block of them are computed again
        num_blocks = ceil(work.amount.num_examples * self.row_bytes / self._memory)
        return self._grams[1] * work.num_tokens * (1 + num_blocks) / 2

    def _basis(self, directions: int) -> tuple[Any, float]:
        """Return a basis of so many made-up directions, and the seconds of a token."""
        from gradsift.gradients.basis import fitting_basis

        if directions not in self._bases:
            examples = [example for own in self._samples.values() for example in own]
            made_up = np.random.default_rng(0).normal(size=(len(examples), directions))
            self._bases.clear()  # they are large
            started = time.perf_counter()
            basis = fitting_basis(self._model, [(examples, made_up)], self._job.config)
            took = (time.perf_counter() - started) / _num_tokens(examples)
            self._bases[directions] = basis, took
        return self._bases[directions]

    def _gather(self, work: Work) -> float:
        return self._basis(work.directions)[1] * work.num_tokens

    def _project(self, work: Work) -> float:
        from gradsift.gradients.projection import project

        model, basis = self._model, self._basis(work.directions)[0]

        def run(examples: Sequence[Encoded], max_tokens: int) -> object:
            return project(model, examples, max_tokens, basis).losses.cpu()

        return work.num_tokens / self._pool_speed(work.kind, run, model)

    def _project_at_random(self, work: Work) -> float:
        from gradsift.gradients.per_example import gradient_rows
        from gradsift.gradients.random_projection import Projection, project_at_random

        model, at_once = self._model, self.rows_at_once
        projection = Projection(work.directions, 0, model.device)

        def direction(_: str, rows: Tensor) -> Tensor:
            return adam_direction(rows, rows[0], rows[0].square())

        def run(examples: Sequence[Encoded], max_tokens: int) -> None:
            if projection.in_kernel:
                found = project_at_random(model, examples, max_tokens, projection, direction)
                found[0, 0].item()
                return
            for start in range(0, len(examples), at_once):
                rows = gradient_rows(model, examples[start : start + at_once], max_tokens)
                next(iter(rows.values()))[0, 0].item()  # waits for the device

        seconds = work.num_tokens / self._pool_speed(work.kind, run, model)
        if projection.in_kernel:
            return seconds
        count = work.passes * work.amount.num_examples
        return seconds + count * self._random_projection(work.directions, model.device)

    def _random_projection(self, directions: int, device: torch.device) -> float:
        """Return the seconds that Adam's direction of one gradient and its projection take."""
        import torch

        from gradsift.gradients.random_projection import Projection

        num_rows, took = self.rows_at_once, 0.0
        projection = Projection(directions, 0, device)
        rows = torch.randn(num_rows, _PARAMETERS, device=device)
        into = torch.zeros(num_rows, directions, device=device)
        for _ in range(2):  # the first time pays for what is set up once
            started = time.perf_counter()
            projection.add(adam_direction(rows, rows[0], rows[0].square()), 0, into)
            into[0, 0].item()
            took = time.perf_counter() - started
        return took / num_rows * self.row_bytes / (rows.itemsize * _PARAMETERS)

    def _forward(self, work: Work) -> float:
        from gradsift.models.forward import run_forward

        model = self._job.models.base()

        def run(examples: Sequence[Encoded], max_tokens: int) -> object:
            return run_forward(model, examples, max_tokens).losses.cpu()

        return work.num_tokens / self._pool_speed(work.kind, run, model)

    def _pool_speed(self, kind: str, run: RunBatches, model: nn.Module) -> float:
        if kind not in self.pool_speeds:
            self.pool_speeds[kind] = _try_pool(self._job.pool, self._job.config.engine, run, model)
        return self.pool_speeds[kind].tokens_per_second


def _try_pool(
    pool: EncodedSet, engine: EngineConfig, run: RunBatches, model: nn.Module
) -> PoolSpeed:
    """Measure a pass over batches drawn from the whole pool."""
    import torch
    from accelerate.utils.memory import clear_device_cache

    from gradsift.models.batch_size import find_batch_tokens, run_worst, within_memory
    from gradsift.models.batches import device_of

    device = device_of(model)
    lengths = pool.table(["num_tokens"])["num_tokens"].to_numpy()
    max_tokens, peak = find_batch_tokens(run, lengths, engine, device), 0

    def peak_of(tokens: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)  # what did not fit is not to count
        run_worst(run, lengths, tokens)
        return torch.cuda.max_memory_allocated(device)

    if device.type == "cuda":
        clear_device_cache()
        peak, max_tokens = within_memory(peak_of, max_tokens, lengths)
    window = window_size(engine, shard_size(engine, len(pool)), max_tokens, device)
    speed = _tokens_per_second(pool, run, model, max_tokens, max(window, _POOL_SAMPLE))
    return PoolSpeed(speed, max_tokens, peak)


def _tokens_per_second(
    pool: EncodedSet, run: RunBatches, model: nn.Module, max_tokens: int, sample: int
) -> float:
    from gradsift.models.batches import group_examples

    rng = np.random.default_rng(0)
    examples = pool.examples(rng.permutation(len(pool))[:sample])
    groups = group_examples(model, examples, max_tokens)
    groups = [groups[i] for i in rng.permutation(len(groups))]
    num_tokens, seconds = 0, 0.0
    for number, group in enumerate([groups[0], *groups]):  # the first batch is not counted
        batch = [examples[i] for i in group]
        started = time.perf_counter()
        run(batch, max_tokens)
        if number:
            seconds += time.perf_counter() - started
            num_tokens += _num_tokens(batch)
        if seconds > _POOL_SECONDS:
            break
    return num_tokens / seconds


def _num_examples(pool: EncodedSet, num_tokens: int, at_most: int) -> int:
    """Return how many examples of the pool have so many tokens in the mean, one at least."""
    mean = pool.table(["num_tokens"])["num_tokens"].to_numpy().mean()
    return int(np.clip(num_tokens / mean, 1, at_most))


def _num_tokens(examples: Sequence[Encoded]) -> int:
    return sum(len(example.input_ids) for example in examples)

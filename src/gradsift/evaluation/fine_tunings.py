"""Fine-tunings and their held-out results, each done once and stored under a hash of its inputs.

The hash covers all that a training depends on. So an evaluation that was killed goes on with the
first one that is missing, and selections that are the same share one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from gradsift.data.encoded import EncodedSet
from gradsift.errors import NumericsError
from gradsift.evaluation.config import EvaluationConfig
from gradsift.evaluation.lm_eval import Harness
from gradsift.executors.processes import decided_by_first, is_first
from gradsift.methods.job import Job
from gradsift.progress import track
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.hashing import hash_tensors
from gradsift.runs.provenance import package_versions
from gradsift.runs.stage import Stage

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning: on which rows of the pool, for how many steps, with which seed.

    No rows: the base model as it is.
    """

    rows: tuple[int, ...]
    steps: int
    seed: int
    label: str = field(default="", compare=False)


@dataclass(frozen=True)
class HeldOut:
    """Test examples of one target, and the stage that encodes them."""

    examples: EncodedSet
    stage: Stage

    @cached_property
    def num_tokens(self) -> Int[np.ndarray, " example"]:
        """How many tokens of each are predicted."""
        return self.examples.table(["num_supervised"])["num_supervised"].to_numpy()


@dataclass(frozen=True)
class Outcome:
    """How a model does on the test examples of one target.

    `losses` in nats: mean over an example's supervised tokens; `num_correct`: how many of its
    `num_tokens` are predicted right.
    """

    losses: Float[np.ndarray, " example"]
    num_correct: Int[np.ndarray, " example"]
    num_tokens: Int[np.ndarray, " example"]

    @property
    def loss(self) -> float:
        """Mean over all tokens."""
        return float(np.average(self.losses, weights=self.num_tokens))

    @property
    def accuracy(self) -> float:
        """Share of all tokens that are predicted right."""
        return float(self.num_correct.sum() / self.num_tokens.sum())


class FineTuner:
    """Trains fine-tunings and measures them, each once."""

    def __init__(
        self,
        job: Job,
        settings: EvaluationConfig,
        tests: Mapping[str, HeldOut],
    ) -> None:
        """Take what all fine-tunings have in common."""
        self._job, self._settings, self._tests = job, settings.fine_tuning, tests
        self._tasks = Harness.of(
            settings.lm_eval, settings.lm_eval_include, settings.trust_remote_code
        )
        self._run, self._folder = job.folder, job.path(layout.FINE_TUNINGS)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._common = {
            "model": job.inputs.model_settings,
            "lora": job.config.lora.model_dump(),
            "pool": job.inputs.pool_stage.fingerprint,
            **self._settings.model_dump(exclude={"steps", "gradient_checkpointing"}),
        }

    def lacks(self, tuning: FineTuning, targets: Sequence[str], with_tasks: bool = False) -> bool:
        """Return whether the fine-tuning has to be trained to know how it does on these targets."""
        return any(self._lacking(self._stored(tuning), targets, with_tasks))

    def run_all(self, wanted: Sequence[tuple[FineTuning, Sequence[str], bool]]) -> None:
        """Run those that lack something; of processes that train together, in each of them.

        Raises:
            NumericsError: If a loss is not finite.
        """
        with track("fine-tunings", len(wanted), "fine-tunings") as advance:
            for tuning, targets, with_tasks in wanted:
                # begun anew after a machine died: what was done before is there
                if decided_by_first(partial(self.lacks, tuning, targets, with_tasks)):
                    self.run(tuning, targets, with_tasks)
                advance(1)

    def run(self, tuning: FineTuning, targets: Sequence[str], with_tasks: bool = False) -> None:
        """Train the fine-tuning, measure what is not known of it, and keep that beside what is.

        Of processes that train together, the first measures and keeps.

        Raises:
            NumericsError: If a loss is not finite.
        """
        started, stored, path = time.perf_counter(), self._stored(tuning), self._path(tuning)
        names, tasks = self._lacking(stored, targets, with_tasks)
        tensors = load_file(path) if stored else {}
        with self._trained(tuning) as model:
            if not is_first():
                return
            for name in names:
                losses, num_correct = self._measure(model, name)
                tensors |= {f"{name}/loss": losses, f"{name}/num_correct": num_correct}
            found = self._tasks.run(model, self._job.config.model, tasks)
        tests = {name: self._tests[name].stage.fingerprint for name in names}
        facts: dict[str, Any] = {
            "label": tuning.label,
            "num_rows": len(tuning.rows),
            "inputs": self._inputs(tuning),
            "versions": package_versions(),
            "tests": stored.get("tests", {}) | tests,
            "lm_eval": stored.get("lm_eval", {}) | found,
            "seconds": round(time.perf_counter() - started, 3),
        }
        sealed = facts | {"sha256": hash_tensors(tensors, facts)}
        metadata = {"facts": json.dumps(sealed)}
        write_atomically(path, lambda path: save_file(tensors, path, metadata))
        self._run.publish(path)
        outcomes = [f"{name} {self.outcome(tuning, name).loss:.4f}" for name in names]
        outcomes += [f"{task} done" for task in tasks]
        logger.info("%s: %s (%.1f s)", tuning.label, ", ".join(outcomes), facts["seconds"])

    def outcome(self, tuning: FineTuning, target: str) -> Outcome:
        """Return what was found of a fine-tuning that was run."""
        with safe_open(self._path(tuning), "np") as file:
            losses, num_correct = (
                file.get_tensor(f"{target}/{name}") for name in ("loss", "num_correct")
            )
        return Outcome(losses, num_correct, self._tests[target].num_tokens)

    def paths(self, tunings: Iterable[FineTuning]) -> set[Path]:
        """Return the files of some fine-tunings."""
        return {self._path(tuning) for tuning in tunings}

    def tasks(self, tuning: FineTuning) -> dict[str, dict[str, float]]:
        """Return the metrics of the lm-evaluation-harness tasks that these settings ask for."""
        known = self._stored(tuning).get("lm_eval", {})
        return {task: known[task]["metrics"] for task in self._tasks.names if task in known}

    def _lacking(
        self, stored: Mapping[str, Any], targets: Sequence[str], with_tasks: bool
    ) -> tuple[list[str], list[str]]:
        """Return the targets and the lm-evaluation-harness tasks that are still to be measured."""
        tests, known = stored.get("tests", {}), stored.get("lm_eval", {})
        names = [name for name in targets if tests.get(name) != self._tests[name].stage.fingerprint]
        tasks = [
            task for task in self._tasks.names if with_tasks and self._tasks.lacks(task, known)
        ]
        return names, tasks

    def _inputs(self, tuning: FineTuning) -> dict[str, Any]:
        rows = hashlib.sha256(np.array(tuning.rows, np.int64).tobytes()).hexdigest()
        return self._common | {"rows": rows, "steps": tuning.steps, "seed": tuning.seed}

    def _path(self, tuning: FineTuning) -> Path:
        text = json.dumps(self._inputs(tuning), sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    def _stored(self, tuning: FineTuning) -> dict[str, Any]:
        """Return the facts that are stored of a fine-tuning; one that is damaged is done again."""
        path = self._path(tuning)
        if not path.exists():
            return {}
        facts: dict[str, Any] = {}
        try:
            with safe_open(path, "np") as file:
                facts = json.loads(file.metadata()["facts"])
                if path in self._run.intact:
                    return facts
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = facts.pop("sha256")
            intact = written == hash_tensors(tensors, facts)
            intact = intact and facts["inputs"] == json.loads(json.dumps(self._inputs(tuning)))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            logger.warning("%s is damaged and is done again: %s", path, tuning.label)
            self._run.remove(path)
            return {}
        self._run.intact.add(path)
        return facts

    @contextmanager
    def _trained(self, tuning: FineTuning) -> Iterator[nn.Module]:
        """Yield the model of a fine-tuning, for as long as it is measured."""
        if not tuning.rows:
            yield self._job.models.base()
            return
        from gradsift.models.training import train

        examples = self._job.pool.examples(tuning.rows)
        with self._job.models.with_fresh_adapter(self._job.config.lora, tuning.seed) as model:
            train(
                model, examples, self._settings,
                steps=tuning.steps, seed=tuning.seed, label="fine-tuning", progress=False,
                trackers=self._job.trackers(f"{tuning.label} {self._path(tuning).stem}"),
            )  # fmt: skip
            yield model.eval()

    def _measure(self, model: nn.Module, name: str) -> tuple[np.ndarray, np.ndarray]:
        from gradsift.models.batch_size import start_tokens, within_memory
        from gradsift.models.batches import device_of, lengths_of
        from gradsift.models.forward import run_forward

        test = self._tests[name].examples
        examples = test.examples(range(len(test)))
        tokens = start_tokens(self._job.config.engine, device_of(model))
        work = partial(run_forward, model, examples)
        found, _ = within_memory(work, tokens, lengths_of(examples))
        losses = found.losses.cpu().numpy()
        if not np.isfinite(losses).all():
            raise NumericsError(
                f"the loss on the held-out examples of {name!r} is not finite; if that of the base "
                "model is, lower fine_tuning.learning_rate"
            )
        return losses, found.num_correct.cpu().numpy()

"""What `gradsift evaluate` compares, and how each fine-tuning is done."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from gradsift.config import MethodName
from gradsift.methods.registry import METHODS
from gradsift.sections import MAX_COUNT, Count, Section, Seed, Sources
from gradsift.types import Budget

_WITHOUT_EXTRAS: Any = tuple(name for name in METHODS if name != "embed")
_TASK = re.compile(r"[\w.:/-]+")


class FineTuningConfig(Section):
    """The same LoRA fine-tuning for every selection; its adapter is the run's `lora`."""

    steps: Count = Field(default=100, description="optimizer steps of every fine-tuning")
    learning_rate: float = Field(default=2e-5, gt=0)
    batch_size: Count = 128
    micro_batch_size: Count = 8
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)


class LdsConfig(Section):
    """The linear datamodeling score: fine-tunings on random subsets of the pool.

    Park et al., 2023, arXiv 2303.14186.
    """

    subsets: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="how many; 0: it is not measured"
    )
    share: float = Field(default=0.5, gt=0, lt=1, description="of the sample in each subset")
    sample: int | None = Field(default=None, ge=4, description="examples; all of the pool if none")
    seed: Seed = 0

    @field_validator("subsets")
    @classmethod
    def _enough(cls, subsets: int) -> int:
        if 0 < subsets < 32:
            raise ValueError(f"a correlation over fewer than 32 subsets says little, {subsets=}")
        return subsets


class EvaluationConfig(Section):
    """A whole evaluation, as it stands in `evaluation/config.yaml`."""

    tests: dict[str, Sources] = Field(min_length=1, description="held-out examples by target")
    methods: tuple[MethodName, ...] = Field(
        default=_WITHOUT_EXTRAS, description="embed only where asked for: it needs an extra"
    )
    budgets: tuple[str, ...] = Field(default=(), description="those of the run if none is given")
    seeds: int = Field(default=2, ge=2, le=MAX_COUNT, description="fine-tunings of each selection")
    random_seeds: int = Field(
        default=3, ge=3, le=MAX_COUNT, description="random selections, one training each"
    )
    full: bool = Field(default=False, description="also one pass over the whole pool")
    fine_tuning: FineTuningConfig = FineTuningConfig()
    lds: LdsConfig = LdsConfig()
    lm_eval: tuple[str, ...] = Field(default=(), description="lm-evaluation-harness tasks")
    lm_eval_include: str | None = Field(default=None, description="a folder of more tasks")
    trust_remote_code: bool = Field(
        default=False, description="run what comes with the tasks of lm_eval_include"
    )

    @field_validator("budgets")
    @classmethod
    def _budgets(cls, budgets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(Budget.parse(budget)) for budget in budgets))

    @field_validator("methods", "lm_eval")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names))

    @field_validator("lm_eval")
    @classmethod
    def _tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if not _TASK.fullmatch(task):
                raise ValueError(f"expected the name of a task, found {task!r}")
        return tasks

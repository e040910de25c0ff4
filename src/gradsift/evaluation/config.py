"""What `gradsift evaluate` compares, and how each fine-tuning is done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from gradsift.config import Config, with_engine
from gradsift.data.sets import check_first_rows
from gradsift.errors import ConfigError, check_installed, shorten, suggest
from gradsift.evaluation.variants import configure_variant
from gradsift.methods.registry import METHODS
from gradsift.runs.opening import read_config
from gradsift.sections import MAX_COUNT, Count, Section, Seed, Sources, setting
from gradsift.types import Budget

_WITHOUT_EXTRAS: Any = tuple(name for name in METHODS if name != "embed")
_TASK = re.compile(r"[\w.:/-]+")


class FineTuningConfig(Section):
    """The same LoRA fine-tuning for every selection; its adapter is the run's `lora`."""

    steps: Count = setting(100, "optimizer steps of every fine-tuning")
    learning_rate: float = setting(2e-5, "peak of AdamW's rate", "2e-5", gt=0)
    batch_size: Count = setting(128, "examples per optimizer step", "128")
    micro_batch_tokens: Literal["auto"] | Count = setting(
        "auto", "padded tokens per forward pass; auto: 1,024 on a CPU, what fits on a GPU"
    )
    gradient_checkpointing: Literal["auto"] | bool = setting(
        "auto", "compute activations twice to keep fewer; auto: if one example does not fit"
    )
    warmup_ratio: float = setting(
        0.03, "share of the steps in which the rate rises", "0.03", ge=0, lt=1
    )
    weight_decay: float = setting(0.0, "weight decay of AdamW", ge=0)


class LdsConfig(Section):
    """The linear datamodeling score: fine-tunings on random subsets of the pool.

    Park et al., 2023, arXiv 2303.14186.
    """

    measure: bool = setting(False, "whether it is measured (--lds)")
    subsets: int = setting(
        64, "random subsets, a fine-tuning each; fewer than 32 say little", ge=32, le=MAX_COUNT
    )
    share: float = setting(0.5, "share of the sample in each subset", gt=0, lt=1)
    sample: int | None = setting(None, "pool examples that subsets are drawn from; none: all", ge=4)
    seed: Seed = setting(0, "draws sample and subsets")


class EvaluationConfig(Section):
    """A whole evaluation, as it stands in `evaluation/config.yaml`.

    Examples:
        >>> EvaluationConfig.build({"tests": {"gsm8k": "gsm8k_test.jsonl"}, "seeds": 2}).seeds
        2
    """

    tests: dict[str, Sources] = setting(..., "held-out examples by target (--test)", min_length=1)
    methods: tuple[str, ...] = setting(
        _WITHOUT_EXTRAS,
        "methods that are compared (--method), or variants (gist:norm_power=1); embed: an extra",
    )
    budgets: tuple[str, ...] = setting(
        (), "budgets of the picks (--budget); the run's if none is given"
    )
    seeds: int = setting(3, "fine-tunings of each selection (--seeds)", ge=2, le=MAX_COUNT)
    random_seeds: int = setting(5, "random selections, one fine-tuning each", ge=3, le=MAX_COUNT)
    warmup_seeds: Count = setting(
        1, "how often warm-up and picks are repeated with other seeds (--warmup-seeds)"
    )
    quantiles: int = setting(
        0,
        "parts of each ranking that are fine-tuned on, 5 say; 0: none (--quantiles)",
        ge=0,
        le=100,
    )
    full: bool = setting(False, "train on the whole pool as well (--full)")
    fine_tuning: FineTuningConfig = FineTuningConfig()
    lds: LdsConfig = LdsConfig()
    lm_eval: tuple[str, ...] = setting((), "tasks of lm-evaluation-harness (--lm-eval)")
    lm_eval_include: str | None = setting(None, "a folder of more such tasks")
    trust_remote_code: bool = setting(
        False, "run the code that comes with the tasks of lm_eval_include"
    )

    @field_validator("budgets", mode="before")
    @classmethod
    def _budgets(cls, budgets: Any) -> Any:
        if not isinstance(budgets, list | tuple):
            return budgets  # the model says what it expected
        return tuple(dict.fromkeys(str(Budget.parse(str(budget))) for budget in budgets))

    @field_validator("quantiles")
    @classmethod
    def _enough_parts(cls, quantiles: int) -> int:
        if 0 < quantiles < 3:
            raise ValueError(f"a trend needs at least 3 parts, found {quantiles}")
        return quantiles

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for text in methods:
            name = text.partition(":")[0]
            if name not in METHODS:
                raise ValueError(
                    f"expected one of {', '.join(METHODS)}, perhaps with settings "
                    f"(gist:norm_power=1), found {shorten(repr(text))}{suggest(name, METHODS)}"
                )
        return methods

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


def check_evaluation(
    run: str | Path, settings: EvaluationConfig, engine: Mapping[str, Any] | None = None
) -> Config:
    """Find out in a second what would stop an evaluation; return the settings of the run.

    `engine`: as in `evaluate`.

    Raises:
        ConfigError: If a test belongs to no target, or something that it needs is not installed.
        DataError: If a test file is not there or its first rows cannot be used.
        RunError: If there is no such run.
    """
    config = with_engine(read_config(run), engine or {})
    for name in settings.tests:
        if name not in config.data.targets:
            known = config.data.targets
            raise ConfigError(
                f"held-out examples for {name!r}, which is no target of this run"
                f"{suggest(name, known)} (its targets: {', '.join(known)})"
            )
    check_first_rows(settings.tests, config.data.columns)
    if settings.lm_eval:
        check_installed("lm_eval", "--lm-eval", "lm-eval")
    for text in settings.methods:
        variant = configure_variant(config, text)
        METHODS[variant.method].check(variant)
    if settings.warmup_seeds > 1 and config.warmup.adapter is not None:
        raise ConfigError(
            "--warmup-seeds repeats the warm-up, but this run measures at an adapter of yours "
            f"({config.warmup.adapter}): leave it out, or let gradsift train the warm-up"
        )
    return config

"""Tasks of lm-evaluation-harness (Gao et al., 2024) on a model with its adapter in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradsift.config import ModelConfig
from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def check_tasks(names: Sequence[str], include: str | None) -> None:
    """Find out before the work whether the harness is there and knows the tasks.

    Raises:
        ConfigError: If it is not installed, or a task is unknown.
    """
    manager = _manager(include)
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigError(f"lm-evaluation-harness knows no task {name!r}; see lm-eval ls tasks")


def run_tasks(
    model: nn.Module, config: ModelConfig, names: Sequence[str], include: str | None
) -> dict[str, dict[str, float]]:
    """Return the metrics of each task, by name, standard errors among them."""
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    from gradsift.model import load_tokenizer

    wrapped: Any = HFLM(pretrained=model, tokenizer=load_tokenizer(config))  # type: ignore[arg-type]
    found: Any = simple_evaluate(
        model=wrapped, tasks=list(names), task_manager=_manager(include), log_samples=False
    )
    return {
        task: {key: float(v) for key, v in metrics.items() if isinstance(v, int | float)}
        for task, metrics in found["results"].items()
    }


def _manager(include: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError(
            "--lm-eval needs lm-evaluation-harness: pip install 'gradsift[lm-eval]'"
        ) from None
    return TaskManager(include_path=include)

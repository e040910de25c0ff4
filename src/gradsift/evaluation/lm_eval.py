"""Tasks of lm-evaluation-harness (Gao et al., 2024) on a model with its adapter in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.config import ModelConfig
from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

_NO_METRICS = ("sample_len",)


@dataclass(frozen=True)
class Harness:
    """The tasks asked for; `fingerprint` tells the harness and the tasks of one's own from others.

    `manager` knows all tasks; nothing where none is asked for.
    """

    names: tuple[str, ...]
    fingerprint: str
    manager: Any

    @classmethod
    def of(cls, names: Sequence[str], include: str | None, trust: bool = False) -> Harness:
        """Return the harness for some tasks, those in the folder `include` among them.

        `trust`: whether the code of that folder may run.

        Raises:
            ConfigError: If it is not installed, a task is unknown, or `include` is not trusted.
        """
        if not names:
            return cls((), "", None)
        if include and not trust:
            raise ConfigError(
                f"tasks of your own ({include}) can run code, in functions and in templates; if "
                "you trust all that is in the folder, say --set trust_remote_code=true"
            )
        try:
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

            digest = hashlib.sha256(version("lm_eval").encode())
        except (ImportError, PackageNotFoundError):
            raise ConfigError(
                "--lm-eval needs lm-evaluation-harness: pip install 'gradsift[lm-eval]'"
            ) from None
        manager = TaskManager(include_path=include)
        for name in names:
            if not manager.match_tasks([name]):
                raise ConfigError(
                    f"lm-evaluation-harness knows no task {name!r}; see lm-eval ls tasks"
                )
        for path in sorted(Path(include).rglob("*.yaml")) if include else ():
            digest.update(path.read_bytes())
        return cls(tuple(names), digest.hexdigest()[:16], manager)

    def lacks(self, task: str, known: Mapping[str, Any]) -> bool:
        """Return whether a task is not among those that were run, as it is now."""
        return known.get(task, {}).get("harness") != self.fingerprint

    def run(
        self, model: nn.Module, config: ModelConfig, names: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Return, by task, its `metrics` (of a group, those of its members) and the fingerprint."""
        if not names:
            return {}
        from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        from gradsift.models.files import load_tokenizer

        tokenizer: Any = load_tokenizer(config)
        wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size="auto")  # type: ignore[arg-type]
        found = {}
        for name in names:
            results: Any = simple_evaluate(
                model=wrapped, tasks=[name], task_manager=self.manager, log_samples=False
            )
            metrics = {
                f"{task} {key}": float(value)
                for task, values in results["results"].items()
                for key, value in values.items()
                if isinstance(value, int | float) and key not in _NO_METRICS
            }
            found[name] = {"harness": self.fingerprint, "metrics": metrics}
        return found

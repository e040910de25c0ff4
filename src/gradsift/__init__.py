"""Pick the few per cent of an instruction-tuning pool that help your task, by their gradients.

>>> import gradsift
>>> gradsift.Budget.parse("5%").unit
'%'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from gradsift.config import Config
    from gradsift.errors import GradsiftError
    from gradsift.evaluation.config import EvaluationConfig
    from gradsift.evaluation.evaluate import evaluate
    from gradsift.evaluation.results import Evaluation
    from gradsift.forecast import Forecast, plan
    from gradsift.geometry.measure import measure_geometry
    from gradsift.indexing import Index, index, open_index
    from gradsift.pipeline import run, select
    from gradsift.report.write import write_report
    from gradsift.selection.explanation import Explanation, explain
    from gradsift.selection.picks import Selection
    from gradsift.selection.run_result import RunResult, open_run
    from gradsift.types import Budget

_HOME = {
    "Budget": "types",
    "Config": "config",
    "Evaluation": "evaluation.results",
    "EvaluationConfig": "evaluation.config",
    "Explanation": "selection.explanation",
    "Forecast": "forecast",
    "GradsiftError": "errors",
    "Index": "indexing",
    "RunResult": "selection.run_result",
    "Selection": "selection.picks",
    "evaluate": "evaluation.evaluate",
    "explain": "selection.explanation",
    "index": "indexing",
    "measure_geometry": "geometry.measure",
    "open_index": "indexing",
    "open_run": "selection.run_result",
    "plan": "forecast",
    "run": "pipeline",
    "select": "pipeline",
    "write_report": "report.write",
}
__all__ = [
    "Budget",
    "Config",
    "Evaluation",
    "EvaluationConfig",
    "Explanation",
    "Forecast",
    "GradsiftError",
    "Index",
    "RunResult",
    "Selection",
    "evaluate",
    "explain",
    "index",
    "measure_geometry",
    "open_index",
    "open_run",
    "plan",
    "run",
    "select",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import gradsift` loads neither torch nor numpy."""
    if name not in _HOME:
        raise AttributeError(f"module 'gradsift' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gradsift.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]

"""The index of a pool: one pass that needs no target, and then any target in seconds.

A folder like that of a run, which holds the pool, the adapter and a sketch of every gradient
(`gradients/sketch.py`). What is asked of it is a run too, in the same folder or in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.config import Config, ModelConfig, PolicyConfig
from gradsift.data.given import Data, keep_given
from gradsift.errors import DataError, translate_os_errors
from gradsift.methods.pool_index import check_index, index_stages, measure_index
from gradsift.pipeline import (
    check_settings,
    configure,
    encode,
    keep_first_config,
    name_of_model,
    run,
)
from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.runs.indexes import AskedIndex, ask_index, index_settings, read_index_config
from gradsift.runs.opening import local_folder, locked_run, read_config
from gradsift.sections import merge
from gradsift.selection.run_result import RunResult
from gradsift.selection.stages import RunStages

if TYPE_CHECKING:
    from gradsift.models.cache import ModelCache


def index(
    run: str | Path,
    *,
    model: str | Path | None = None,
    pool: Data | None = None,
    settings: Mapping[str, Any] | None = None,
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Sketch every pool example's gradient, so that any target can be asked for in seconds.

    `run`: a folder or URL. Of a run, or an index that broke off, its own model, pool and settings
    are taken where none are given; `settings` are as for `select`. Returns the folder (of a URL,
    its copy here).

    Examples:
        >>> gradsift.index("runs/index", model="Qwen/Qwen2.5-1.5B",          # doctest: +SKIP
        ...                pool="data/*.jsonl")
        PosixPath('runs/index')

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    given: dict[str, Any] = {"model": {}, "data": {}}
    if model is not None:
        given["model"]["name"] = name_of_model(model)
    if pool is not None:
        given["data"]["pool"] = keep_given(pool, "pool", local_folder(run))
    config = Config.build(merge(settings_in(run), given, settings or {}))
    return make_index(config, run, strict, overwrite)


def settings_in(location: str | Path) -> dict[str, Any]:
    """Return the settings of the index in a folder, or of the run there; none if there is neither.

    Raises:
        RunError: If they are not as they were written.
    """
    path = local_folder(location)
    if (path / layout.INDEX_CONFIG).exists():
        return read_index_config(Run(path), location).model_dump()
    return read_config(location).model_dump() if (path / layout.CONFIG).exists() else {}


@translate_os_errors()
def make_index(
    config: Config, location: str | Path, strict: bool = False, overwrite: bool = False
) -> Path:
    """Make the index of a configuration, whose targets and method are of no concern; see `index`.

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    own = config.index.model_copy(update={"path": None})
    data = config.data.model_copy(update={"targets": {}})
    changes = {"data": data, "index": own, "method": "gist", "policy": PolicyConfig()}
    config = config.model_copy(update=changes)
    check_settings(config, has_targets=False)
    stages = RunStages.of(config)
    inputs = stages.inputs
    with locked_run(location) as folder:
        folder.prepare([inputs.pool_stage, inputs.warmup_stage, *index_stages(inputs)], overwrite)
        folder.write_config(config, layout.INDEX_CONFIG)
        keep_first_config(folder, config)
        job = encode(stages, folder, strict)
        if len(job.pool) < 2:
            raise DataError("an index needs a pool of two examples at least, found one")
        measure_index(job)
        return folder.path


@translate_os_errors()
def open_index(path: str | Path) -> Index:
    """Return an index that `gradsift index` made, of which any number of targets may be asked.

    Examples:
        >>> index = gradsift.open_index("runs/index")                        # doctest: +SKIP
        >>> [*index.select(target="gsm8k_dev.jsonl").selections]             # doctest: +SKIP
        ['gsm8k_dev']

    Raises:
        RunError: If the folder holds no index, or one that is not finished or not whole.
    """
    asked = ask_index(path)
    config = Config.build(index_settings(path))
    check_index(RunStages.of(config, asked).inputs)
    return Index(path, config, asked)


class Index:
    """An index; the model is loaded with the first target and kept.

    Examples:
        >>> index = gradsift.open_index("runs/index")                        # doctest: +SKIP
        >>> for name in ("gsm8k_dev", "gsm8k_test"):                         # doctest: +SKIP
        ...     result = index.select(target=f"{name}.jsonl", output_dir=f"runs/{name}")
    """

    def __init__(self, path: str | Path, config: Config, asked: AskedIndex) -> None:
        self.path = path
        self._config, self._asked = config, asked
        self._models: tuple[ModelConfig, ModelCache] | None = None

    def __repr__(self) -> str:
        model, pool = self._config.model.name, ", ".join(self._config.data.pool)
        return f"Index({str(self.path)!r}: {pool}, by {model})"

    def select(
        self,
        *,
        target: Mapping[str, Data] | Data,
        budget: str = "5%",
        method: str = "gist",
        output_dir: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> RunResult:
        """Pick for some targets; see `gradsift.select`. By default into the index's own folder.

        Raises:
            GradsiftError: If something has to be mended first; the message says what and how.
        """
        from gradsift.models.cache import ModelCache

        config = configure(
            target=target, output_dir=output_dir or self.path, index=self.path, budget=budget,
            method=method, settings=settings,
        )  # fmt: skip
        if self._models is None or self._models[0] != config.model:
            self._models = (config.model, ModelCache(config.model, config.engine.deterministic))
        folder = output_dir or self.path
        return run(config, folder, models=self._models[1], index=self._asked)

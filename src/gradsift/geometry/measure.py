"""The paper's claims, measured on the user's own model and targets.

Whether few directions hold the target's gradients, whether they are those in which the loss curves
most, and how much of that curvature a diagonal preconditioner such as Adam's cannot hold.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.config import LoraConfig, ModelConfig, with_engine
from gradsift.errors import ConfigError, RunError, suggest, translate_os_errors
from gradsift.geometry.config import GeometryConfig
from gradsift.geometry.figures import exhibits
from gradsift.methods.job import Job, open_job
from gradsift.pipeline import encode
from gradsift.report.exhibits import write_exhibits
from gradsift.report.write import refresh_report
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.opening import locked_run, read_config
from gradsift.runs.stage import Stage
from gradsift.selection.stages import RunStages

if TYPE_CHECKING:
    import peft

    from gradsift.models.cache import ModelCache

logger = logging.getLogger(__name__)

_BEFORE = "before warm-up"


@translate_os_errors()
def measure_geometry(
    run: str | Path,
    *,
    targets: Sequence[str] = (),
    engine: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Mapping[str, Any]:
    """Measure spectrum, subspace and coupling of a run's targets; return `geometry.json`.

    `targets`: names of those to measure now, all if there are none; what was measured of others, at
    the same data and adapter, stays. `settings` are as in `GeometryConfig`; `engine` holds those of
    that section that differ from the run's. Figures and numbers go into `geometry/` and the report.
    Run it again to go on after a crash.

    Examples:
        >>> found = gradsift.measure_geometry("runs/gsm8k", examples=8)      # doctest: +SKIP
        >>> [*found["gsm8k"]]                                                # doctest: +SKIP
        [...]

    Raises:
        GradsiftError: If something has to be mended first; the message says what and how.
    """
    wanted, config = GeometryConfig.build(settings), with_engine(read_config(run), engine or {})
    for name in targets:
        if name not in config.data.targets:
            known = config.data.targets
            raise ConfigError(
                f"{run} has no target {name!r}{suggest(name, known)} (its own: {', '.join(known)})"
            )
    if config.model.quantization != "none":
        raise ConfigError(
            "geometry differentiates twice, which quantized layers do not; use a run whose "
            "model.quantization is none"
        )
    from gradsift.models.cache import ModelCache  # from here on it takes long: torch is loaded

    stages = RunStages.of(config)
    inputs, warmup = stages.inputs, stages.inputs.warmup_stage
    with locked_run(run) as folder:
        folder.prepare([*inputs.data_stages.values(), warmup])
        if not folder.facts([warmup]):
            raise RunError(f"{run} holds no adapter; run `gradsift select --method gist` with it")
        run_job = encode(stages, folder, strict=False)
        run_job.warm_up(warmup)
        # what curves little is lost in half precision
        job = open_job(
            inputs, folder, ModelCache(_in_float32(config.model), config.engine.deterministic)
        )
        models, found = _models_to_measure(job), {}
        for name in job.targets:
            if not targets or name in targets:
                found[name] = _measure_target(job, name, models, warmup, wanted)
            elif earlier := _measured_before(job, name, [*models], warmup):
                found[name] = earlier
            else:
                logger.info("%s is not measured, or at another adapter: it is left out", name)
        content = json.dumps(found, indent=1).encode()
        write_atomically(job.path(layout.GEOMETRY_NUMBERS), content)
        of = {name: inputs.gradients_key(name) for name in job.targets}
        shown = {name: exhibits(own) for name, own in found.items()}
        write_exhibits(folder, layout.GEOMETRY, shown, of)
        refresh_report(run_job, stages)
        return found


def _measured_before(
    job: Job, name: str, labels: Sequence[str], warmup: Stage
) -> dict[str, Any] | None:
    """Return what an earlier command found of a target, if it is of the same data and adapter."""
    names = [layout.geometry_at(name, label).removesuffix(".json") for label in labels]
    sources = (job.inputs.target_stage(name), warmup)
    if not all(job.folder.is_made_from(stage, sources) for stage in names):
        return None
    return _assemble(job, name, labels)


def _assemble(job: Job, name: str, labels: Sequence[str]) -> dict[str, Any]:
    """Return what the files of a target say, at every adapter; the last one has the coupling."""
    found = {
        label: json.loads(job.path(layout.geometry_at(name, label)).read_text(encoding="utf-8"))
        for label in labels
    }
    return {"coupling": found[labels[-1]].pop("coupling"), "places": found}


def _in_float32(model: ModelConfig) -> ModelConfig:
    """Return the model as it can be differentiated twice: fused attention cannot."""
    return model.model_copy(update={"dtype": "float32", "attention": "eager"})


OpenModel = Callable[[], AbstractContextManager["peft.PeftModel"]]
"""Opens a context with the model at one adapter."""


def _models_to_measure(job: Job) -> dict[str, OpenModel]:
    """Return the models to measure: with the fresh adapter, if it is known, and each checkpoint."""
    config = job.config
    models: dict[str, OpenModel] = {}
    if config.warmup.adapter is None and config.warmup.mode == "train":
        models[_BEFORE] = partial(_fresh, job.models, config.lora, config.warmup.seed)
    for checkpoint in job.checkpoints():
        models[checkpoint.label] = partial(_at, job.models, checkpoint.path)
    return models


@contextmanager
def _fresh(models: ModelCache, lora: LoraConfig, seed: int) -> Iterator[peft.PeftModel]:
    with models.with_fresh_adapter(lora, seed) as model:
        yield model.requires_grad_(False).eval()


def _at(models: ModelCache, path: Path) -> AbstractContextManager[peft.PeftModel]:
    return nullcontext(models.with_adapter(path))


def _measure_at(
    open_model: OpenModel, job: Job, name: str, settings: GeometryConfig, coupling: bool
) -> dict[str, Any]:
    from gradsift.geometry.target import measure_target

    with open_model() as model:
        return measure_target(model, name, job.targets[name], job.config, settings, coupling)


def _measure_target(
    job: Job, name: str, models: Mapping[str, OpenModel], warmup: Stage, settings: GeometryConfig
) -> dict[str, Any]:
    """Return what is found of a target at every adapter, measured now or before."""
    gist = job.config.gist.model_dump(include={"rank"})
    sources = (job.inputs.target_stage(name), warmup)
    for number, (label, open_model) in enumerate(models.items(), start=1):
        last = number == len(models)
        wanted = settings.model_dump() if last else settings.model_dump(exclude={"probes"})
        path = layout.geometry_at(name, label)
        depends = wanted | {"gist": gist, "place": label}
        stage = Stage(path.removesuffix(".json"), depends, (path,), sources, cheap=True)
        with job.folder.stage(stage) as todo:
            if todo:
                found = job.call(partial(_measure_at, open_model, job, name, settings, last))
                logger.info("%s, %s: measured", name, label)
                job.path(path).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(job.path(path), json.dumps(found, indent=1).encode())
    return _assemble(job, name, [*models])

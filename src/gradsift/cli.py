"""The command line: verbs, messages, exit codes.

0: done. 1: a fault of ours. 2: something the user can mend.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.types import MethodName

if TYPE_CHECKING:
    from rich.console import Console

    from gradsift.config import Config
    from gradsift.evaluation.results import Evaluation
    from gradsift.forecast import Forecast
    from gradsift.pipeline import RunResult

_SOURCES_SHOWN = 8

app = typer.Typer(
    help="Pick the few per cent of an instruction-tuning pool that help your task.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Executor(StrEnum):
    """Where the work is done."""

    local = "local"
    ray = "ray"


class Warmup(StrEnum):
    """What precedes the measuring."""

    train = "train"
    none = "none"


OutputDir = Annotated[
    str, typer.Option(help="the run folder, also s3://bucket/run; the same one resumes")
]
Model = Annotated[str | None, typer.Option(help="a local folder or a Hub id")]
Pool = Annotated[list[str], typer.Option(help="file, glob, folder or Hub id; may be repeated")]
Target = Annotated[
    list[str], typer.Option(metavar="NAME=FILE", help="examples of the task; repeatable")
]
Budget = Annotated[str | None, typer.Option(help="5%, 2000 or 3Mtok (default: 5%)")]
Method = Annotated[MethodName | None, typer.Option(help="how the pool is scored (default: gist)")]
Adapter = Annotated[
    str | None, typer.Option(help="an existing LoRA adapter, in place of a warm-up")
]
WarmupMode = Annotated[Warmup | None, typer.Option(help="'none' measures at a fresh adapter")]
Memory = Annotated[
    str | None,
    typer.Option(help="for target gradients and bases on the device: 20GiB (default: half of it)"),
]
Engine = Annotated[Executor | None, typer.Option(help="'ray' spreads the work over machines")]
RayAddress = Annotated[
    str | None, typer.Option(help="of a Ray cluster, or auto (default: begin one here)")
]
Workers = Annotated[
    int | None, typer.Option(help="of the pool pass on Ray (default: one per GPU or machine)")
]
RunFolder = Annotated[str, typer.Argument(help="the run folder")]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file of settings; flags go before it")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="any other setting")
]
Strict = Annotated[bool, typer.Option(help="stop at the first unusable row")]
Overwrite = Annotated[bool, typer.Option(help="redo stages made with other settings")]


@app.command()
def select(
    output_dir: OutputDir,
    model: Model = None,
    pool: Pool = [],  # noqa: B006
    target: Target = [],  # noqa: B006
    budget: Budget = None,
    method: Method = None,
    adapter: Adapter = None,
    warmup: WarmupMode = None,
    memory: Memory = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Score a pool against target examples and pick the best within a budget."""
    flags = _flags(model, pool, target, budget, adapter, warmup, memory)
    flags |= {"method": method}
    flags["engine"] |= _engine(engine, ray_address) | {"workers": workers}
    resolved = _resolve(config, flags, settings)
    if resolved.engine.executor != "ray" and (ray_address or workers):
        from gradsift.errors import ConfigError

        raise ConfigError("--ray-address and --workers are for Ray: give --engine ray as well")
    with _logged(output_dir):
        from gradsift.pipeline import run

        result = run(resolved, output_dir, strict=strict, overwrite=overwrite)
    _show(result, output_dir)


@app.command()
def plan(
    output_dir: OutputDir,
    model: Model = None,
    pool: Pool = [],  # noqa: B006
    target: Target = [],  # noqa: B006
    budget: Budget = None,
    adapter: Adapter = None,
    warmup: WarmupMode = None,
    memory: Memory = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
    strict: Strict = False,
) -> None:
    """Say what `select` with the same arguments will take: seconds, memory, disk."""
    flags = _flags(model, pool, target, budget, adapter, warmup, memory)
    resolved = _resolve(config, flags, settings)
    with _logged(output_dir):
        from gradsift.forecast import forecast

        found = forecast(resolved, output_dir, strict=strict)
    _show_forecast(found)


@app.command()
def evaluate(
    run: RunFolder,
    test: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", help="held-out examples of a target; repeatable"),
    ] = [],  # noqa: B006
    method: Annotated[
        list[str], typer.Option(help="repeatable (default: all but embed); base and random always")
    ] = [],  # noqa: B006
    budget: Annotated[list[str], typer.Option(help="repeatable (default: that of the run)")] = [],  # noqa: B006
    seeds: Annotated[int | None, typer.Option(help="trainings per selection (default: 2)")] = None,
    full: Annotated[bool | None, typer.Option(help="also train on the whole pool")] = None,
    lds: Annotated[
        int | None, typer.Option(help="also the linear datamodeling score, on so many subsets")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASK,…", help="tasks of lm-evaluation-harness")
    ] = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Find out which method helps: the same fine-tuning on what each picks, against random."""
    from gradsift.sections import merge, parse_assignment, read_yaml

    flags = {
        "tests": _targets(test),
        "methods": method,
        "budgets": budget,
        "seeds": seeds,
        "full": full,
        "lds": {"subsets": lds},
        "lm_eval": lm_eval and lm_eval.split(","),
    }
    given = read_yaml(config) if config else {}
    assigned = map(parse_assignment, settings)
    with _logged(run):
        from gradsift.evaluation.config import EvaluationConfig
        from gradsift.evaluation.evaluate import run_evaluation

        merged = merge(given, _given(flags), *assigned, replaced=("tests",))
        place = _engine(engine, ray_address)
        found = run_evaluation(run, EvaluationConfig.build(merged), place)
    _show_evaluation(found, run)


@app.command()
def explain(
    run: RunFolder,
    example: Annotated[str, typer.Argument(metavar="ID", help="id of a pool example")],
) -> None:
    """Say how one pool example fared: scores, ranks, what it is like, why it was picked or not."""
    from gradsift.errors import visible
    from gradsift.selection.explanation import explain as explained

    console = _console()
    for explanation in explained(run, example):
        console.print(visible(explanation.text()), markup=False, highlight=False)


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html anew: the page that explains a selection; it needs no network."""
    with _logged(run):
        from gradsift.report.write import write_report

        path = write_report(run)
    typer.echo(f"→ {_place(run, path.name)}")


@app.command()
def geometry(
    run: RunFolder,
    examples: Annotated[
        int | None, typer.Option(help="of each target, for the Hessian (default: 32)")
    ] = None,
    eigenvectors: Annotated[
        int | None, typer.Option(help="leading ones of the Hessian (default: 10)")
    ] = None,
    probes: Annotated[
        int | None, typer.Option(help="random vectors per LoRA matrix (default: 4)")
    ] = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
) -> None:
    """Measure the paper's claims here: spectrum, curvature, and what a diagonal cannot hold."""
    given = {"examples": examples, "eigenvectors": eigenvectors, "probes": probes}
    with _logged(run):
        from gradsift.geometry.measure import measure_geometry

        found = measure_geometry(run, engine=_engine(engine, ray_address), **_given(given))
    _show_geometry(run, found)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="where the run goes")] = Path("runs/demo"),
) -> None:
    """Show on made-up skills that the picks are the right ones and help: no network, 5 minutes."""
    from gradsift.demo.run_demo import run_demo

    with _logged(None):
        table = run_demo(output_dir)
    typer.echo(table)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from gradsift import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line, with one line for a fault that the user can mend."""
    from gradsift.errors import GradsiftError, system_faults_told, visible
    from gradsift.executors.base import quieten
    from gradsift.executors.torchrun import company

    quieten()
    try:
        with system_faults_told(), company() as leads:
            if leads:
                app()
    except GradsiftError as error:
        typer.secho(visible(f"gradsift: {error}"), err=True, fg="red")
        sys.exit(2)


def _engine(engine: Executor | None, ray_address: str | None) -> dict[str, Any]:
    """Return the settings of the engine that flags stand for; another one forgets the address."""
    if engine is None:
        return {} if ray_address is None else {"ray_address": ray_address}
    return {"executor": engine.value, "ray_address": ray_address}


def _flags(
    model: str | None,
    pool: list[str],
    target: list[str],
    budget: str | None,
    adapter: str | None,
    warmup: Warmup | None,
    memory: str | None,
) -> dict[str, Any]:
    """Return the settings that the flags stand for, by section."""
    return {
        "model": {"name": model},
        "data": {"pool": pool, "targets": _targets(target)},
        "policy": {"budget": budget},
        "warmup": {"adapter": adapter, "mode": warmup and warmup.value},
        "engine": {"memory": memory},
    }


def _resolve(file: Path | None, flags: dict[str, Any], settings: list[str]) -> Config:
    from gradsift.config import Config
    from gradsift.sections import merge, parse_assignment, read_yaml

    given = _given(flags)
    return Config.build(
        merge(read_yaml(file) if file else {}, given, *map(parse_assignment, settings))
    )


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Return what was given, without the flags and sections that were not."""
    inner = {k: _given(v) if isinstance(v, dict) else v for k, v in flags.items()}
    return {key: value for key, value in inner.items() if value not in (None, "", [], {})}


def _targets(given: list[str]) -> dict[str, Any]:
    """Read NAME=FILE, or FILE alone under its stem; a name given twice joins its files."""
    targets: dict[str, list[str]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).name.split(".")[0], text
        targets.setdefault(name, []).append(path)
    return targets


@contextmanager
def _logged(location: str | None) -> Iterator[None]:
    """Send our log to the terminal and to the run folder."""
    logger = logging.getLogger("gradsift")
    logger.setLevel(logging.INFO)
    from gradsift.progress import LogFile, VisibleFormatter

    console = logging.StreamHandler()
    console.setFormatter(VisibleFormatter("%(message)s"))
    handlers: list[logging.Handler] = [console]
    if location is not None:  # opened with the first line, when the folder is known to be ours
        from gradsift.runs.opening import local_folder

        folder = local_folder(location, fetch=False)
        handlers.append(LogFile(folder / "log.txt", delay=True, encoding="utf-8"))
        handlers[-1].setFormatter(VisibleFormatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("interrupted; the same command goes on from here")
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _place(location: str, name: str) -> str:
    """Return where a file of a run folder lies, as its user named the folder."""
    from gradsift.errors import visible

    return visible(f"{location.rstrip('/')}/{name}")


def _console() -> Console:
    from rich.console import Console

    return Console()


def _show(result: RunResult, location: str) -> None:
    """Print what was picked for each target, and from where."""
    from rich.markup import escape
    from rich.table import Table

    from gradsift.errors import visible
    from gradsift.selection.source_shares import source_shares

    console, in_pool = _console(), result.scores(["source"])["source"]
    for name, selection in result.selections.items():
        picks = selection.picks
        table = Table(
            "source",
            *(("picks", "of the picks", "of the pool", "lift")),
            title=f"{name}: {len(picks):,} picks of {result.num_pool:,} by {result.method}, "
            f"{sum(picks['num_tokens'].to_pylist()):,} tokens",
        )
        for row in source_shares(in_pool, picks["source"])[:_SOURCES_SHOWN]:
            table.add_row(
                escape(visible(row.source)),
                f"{row.num_picks:,}",
                f"{row.of_picks:.1%}",
                f"{row.of_pool:.1%}",
                f"{row.lift:.1f}×",
            )
        console.print(table)
        if selection.shortfall:
            console.print(f"short: {selection.shortfall}", style="yellow", markup=False)
        path = _place(location, f"selected/{selection.path.name}")
        console.print(f"→ {path}", markup=False, highlight=False, soft_wrap=True)
    if result.num_rejected:
        path = _place(location, "rejected.jsonl")
        console.print(f"{result.num_rejected:,} unusable rows: {path}", markup=False)
    took = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    path = _place(location, "report.html")
    console.print(f"→ {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"seconds of each stage when it was done: {took}", highlight=False)
    console.print(f"peak memory: {result.peak_memory / 2**30:.2f} GiB", highlight=False)


def _show_evaluation(found: Evaluation, run: str) -> None:
    """Print a table per target and budget, the linear datamodeling scores, and the verdicts."""
    from rich.table import Table

    from gradsift.evaluation.results import interval, plus_minus

    console = _console()
    for target, budget in dict.fromkeys((row.target, row.budget) for row in found.rows):
        titles = ["method", "picks", "held-out loss", "accuracy", "loss less random's [95 %]", ""]
        tasks = sorted({name for row in found.rows for name in row.tasks})
        table = Table(*titles, *tasks, title=f"{target}, {budget}")
        for row in found.rows:
            if (row.target, row.budget) == (target, budget):
                gap = "" if row.difference is None else interval(row.difference, 3)
                loss, accuracy = plus_minus(row.loss, row.loss_std), f"{row.accuracy:.1%}"
                cells = [row.method, f"{row.num_picks:,}", loss, accuracy, gap, row.verdict]
                table.add_row(*cells, *(f"{row.tasks[task]:.4f}" for task in tasks))
        console.print(table)
    if found.lds:
        table = Table("target", "method", "[95 %]", title="linear datamodeling score")
        for score in found.lds:
            table.add_row(score.target, score.method, interval(score.correlation, 2))
        console.print(table)
    for line in found.verdicts:
        console.print(line, markup=False)
    for name in ("evaluation/report.md", "evaluation/table.parquet", "report.html"):
        console.print(f"→ {_place(run, name)}", markup=False, highlight=False, soft_wrap=True)


def _show_geometry(run: str, found: Mapping[str, Any]) -> None:
    """Print the three numbers of each target that the figures are about."""
    from rich.table import Table

    console = _console()
    heads = ("target", "directions for 95 %", "eigenvectors inside", "off the diagonal")
    table = Table(*heads, title="geometry of the target loss")
    for name, target in found.items():
        last = [*target["places"].values()][-1]
        spectrum, captured = last["spectrum"], last["hessian"]["captured"]
        off = target["coupling"]["off_diagonal"]
        told = f"{off['value']:.1%} ± {off['standard_error']:.1%}"
        directions = f"{last['hessian']['rank']} directions hold"
        inside = f"{directions} {sum(captured) / len(captured):.1%} of {len(captured)}"
        table.add_row(name, str(spectrum["r95"]), inside, told)
    console.print(table)
    for name in ("geometry/geometry.json", "report.html"):
        console.print(f"→ {_place(run, name)}", markup=False, highlight=False, soft_wrap=True)


def _show_forecast(forecast: Forecast) -> None:
    """Print seconds by stage, memory and disk."""
    from rich.table import Table

    console = _console()
    table = Table(
        "stage", "seconds", title=f"{forecast.num_pool:,} examples, {forecast.num_tokens:,} tokens"
    )
    for stage, seconds in forecast.seconds.items():
        table.add_row(stage, f"{seconds:,.1f}")
    total = sum(forecast.seconds.values())
    table.add_row("in all, but for loading the model", f"{total:,.0f} ({total / 3600:.2f} h)")
    console.print(table)
    ranks = ", ".join(f"{name} {rank}" for name, rank in forecast.ranks.items())
    gib = 2**30
    for line in (
        f"batches of {forecast.batch_tokens:,} tokens; ranks about: {ranks}",
        f"host memory: {forecast.host_memory / gib:.2f} GiB",
        f"device memory: {forecast.device_memory / gib:.2f} GiB" if forecast.device_memory else "",
        f"disk: {forecast.disk / gib:.3f} GiB",
        "encoding is done and kept; the other stages were tried on a sample",
    ):
        if line:
            console.print(line, markup=False, highlight=False)

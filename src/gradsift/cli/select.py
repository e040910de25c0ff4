"""`gradsift select`: score a pool, pick within the budget, and show where the picks come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsift.cli.options import (
    Adapter,
    Budget,
    ConfigFile,
    Engine,
    Memory,
    Method,
    Model,
    OutputDir,
    Overwrite,
    Pool,
    RayAddress,
    Settings,
    Strict,
    Target,
    WarmupMode,
    Workers,
    engine_settings,
    resolve_config,
    settings_of_flags,
)
from gradsift.cli.output import log_to, make_console, path_in_run, print_path
from gradsift.runs import layout

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from gradsift.pipeline import RunResult
    from gradsift.selection.source_shares import SourceShare

_SOURCES_SHOWN = 8


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
    flags = settings_of_flags(model, pool, target, budget, adapter, warmup, memory)
    flags |= {"method": method}
    flags["engine"] |= engine_settings(engine, ray_address) | {"workers": workers}
    resolved = resolve_config(config, flags, settings)
    if resolved.engine.executor != "ray" and (ray_address or workers):
        from gradsift.errors import ConfigError

        raise ConfigError("--ray-address and --workers are for Ray: give --engine ray as well")
    with log_to(output_dir):
        from gradsift.pipeline import run

        result = run(resolved, output_dir, strict=strict, overwrite=overwrite)
    _show_result(result, output_dir)


def _show_result(result: RunResult, location: str) -> None:
    """Print what was picked for each target, and from where; then the files, time and memory."""
    from gradsift.selection.source_shares import source_shares

    console, in_pool = make_console(), result.scores(["source"])["source"]
    for name, selection in result.selections.items():
        picks = selection.picks
        title = (
            f"{name}: {len(picks):,} picks of {result.num_pool:,} by {result.method}, "
            f"{sum(picks['num_tokens'].to_pylist()):,} tokens"
        )
        shares = source_shares(in_pool, picks["source"])
        console.print(_source_table(title, shares[:_SOURCES_SHOWN]))
        if selection.shortfall:
            console.print(f"short: {selection.shortfall}", style="yellow", markup=False)
        print_path(console, location, layout.picks(name))
    if result.num_rejected:
        path = path_in_run(location, layout.REJECTED)
        console.print(f"{result.num_rejected:,} unusable rows: {path}", markup=False)
    print_path(console, location, layout.REPORT)
    seconds = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    console.print(f"seconds of each stage when it was done: {seconds}", highlight=False)
    console.print(f"peak memory: {result.peak_memory / 2**30:.2f} GiB", highlight=False)


def _source_table(title: str, shares: Iterable[SourceShare]) -> Table:
    """Return a table of the sources of the picks, a row each."""
    from rich.markup import escape
    from rich.table import Table

    from gradsift.errors import visible

    table = Table("source", "picks", "of the picks", "of the pool", "lift", title=title)
    for share in shares:
        table.add_row(
            escape(visible(share.source)),
            f"{share.num_picks:,}",
            f"{share.of_picks:.1%}",
            f"{share.of_pool:.1%}",
            f"{share.lift:.1f}×",
        )
    return table

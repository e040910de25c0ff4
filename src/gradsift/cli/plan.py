"""`gradsift plan`: what a selection will take, before it is begun."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from gradsift.cli.options import (
    Adapter,
    Budget,
    ConfigFile,
    Memory,
    Method,
    Model,
    OutputDir,
    Pool,
    RandomSeed,
    Settings,
    Strict,
    Target,
    WarmupMode,
    resolve_config,
    settings_of_flags,
)
from gradsift.cli.output import log_to, show

if TYPE_CHECKING:
    from rich.console import Console

    from gradsift.batch_effect import BatchEffect
    from gradsift.forecast import Forecast

Check = Annotated[
    bool, typer.Option("--check", help="measure how far scores move with what shares a batch")
]


def plan(
    output_dir: OutputDir,
    model: Model = None,
    pool: Pool = [],  # noqa: B006
    target: Target = [],  # noqa: B006
    budget: Budget = None,
    method: Method = None,
    adapter: Adapter = None,
    warmup: WarmupMode = None,
    memory: Memory = None,
    seed: RandomSeed = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
    strict: Strict = False,
    check: Check = False,
) -> None:
    """Say what `select` with the same arguments will take: seconds, memory, disk."""
    flags = settings_of_flags(model, pool, target, budget, adapter, warmup, memory, seed)
    resolved, _ = resolve_config(config, flags | {"method": method}, settings)
    with log_to(output_dir):
        from gradsift.forecast import forecast

        result = forecast(resolved, output_dir, strict=strict, check=check)
    show(result, partial(_print_forecast, result))


def _print_forecast(forecast: Forecast, console: Console) -> None:
    """Print seconds by stage, memory and disk."""
    from rich.table import Table

    table = Table(
        "stage", "seconds", title=f"{forecast.num_pool:,} examples, {forecast.num_tokens:,} tokens"
    )
    for stage, seconds in forecast.seconds.items():
        table.add_row(stage, f"{seconds:,.1f}")
    total = sum(forecast.seconds.values())
    table.add_row("in all, but for loading the model", f"{total:,.0f} ({total / 3600:.2f} h)")
    console.print(table)
    ranks = ", ".join(f"{name} {rank}" for name, rank in forecast.ranks.items())
    batches = f"batches of {forecast.batch_tokens:,} tokens"
    if not forecast.batch_tokens:
        batches = f"{forecast.method} gives the base model nothing to do: the encoding is forecast"
    gib = 2**30
    for line in (
        f"{batches}; ranks about: {ranks}" if ranks else batches,
        f"host memory: {forecast.host_memory / gib:.2f} GiB",
        f"device memory: {forecast.device_memory / gib:.2f} GiB" if forecast.device_memory else "",
        f"disk: {forecast.disk / gib:.3f} GiB",
        "encoding is done and kept; the other stages were tried on a sample"
        if forecast.batch_tokens
        else "encoding is done and kept",
    ):
        if line:
            console.print(line, markup=False, highlight=False)
    if forecast.batch_effect:
        _print_effect(forecast.batch_effect, console)


def _print_effect(effect: BatchEffect, console: Console) -> None:
    """Print how far scores move between batches in each setting, and what to do."""
    from rich.table import Table

    table = Table(
        "model.dtype", "model.attention", "a score", "coordinates", "places", "seconds",
        title=f"{effect.num_examples} examples alone and in batches: largest difference of …",
    )  # fmt: skip
    for found in effect.tried:
        differences = (f"{found.score:.1e}", f"{found.coordinates:.1e}", str(found.places))
        table.add_row(found.dtype, found.attention, *differences, f"{found.seconds:.2f}")
    console.print(table)
    for setting, reason in effect.not_tried.items():
        console.print(f"not tried: {setting}: {reason}", markup=False, highlight=False)
    console.print(effect.advice, markup=False, highlight=False)

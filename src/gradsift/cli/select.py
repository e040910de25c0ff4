"""`gradsift select`: score a pool, pick within the budget, and show where the picks come from."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gradsift.cli.options import (
    Adapter,
    Budget,
    ConfigFile,
    Engine,
    IndexFolder,
    Memory,
    Method,
    Model,
    Name,
    OutputDir,
    Overwrite,
    Pool,
    RandomSeed,
    RayAddress,
    Settings,
    Strict,
    Target,
    WarmupMode,
    Weights,
    Workers,
    engine_settings,
    resolve_config,
    settings_of_flags,
)
from gradsift.cli.output import log_to, path_in_run, print_path, show
from gradsift.runs import layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

    from gradsift.selection.run_result import RunResult
    from gradsift.selection.source_shares import SourceShare

_SOURCES_SHOWN = 8


def select(
    output_dir: OutputDir,
    model: Model = None,
    pool: Pool = [],  # noqa: B006
    target: Target = [],  # noqa: B006
    index: IndexFolder = None,
    budget: Budget = None,
    name: Name = None,
    weights: Weights = None,
    method: Method = None,
    adapter: Adapter = None,
    warmup: WarmupMode = None,
    memory: Memory = None,
    seed: RandomSeed = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    config: ConfigFile = None,
    settings: Settings = [],  # noqa: B006
    strict: Strict = False,
    overwrite: Overwrite = False,
) -> None:
    """Score a pool against target examples and pick the best within a budget."""
    flags = settings_of_flags(model, pool, target, budget, adapter, warmup, memory, seed)
    flags |= {"method": method}
    flags["policy"] |= {"name": name, "weights": weights and weights.value}
    flags["index"] |= {"path": index}
    flags["engine"] |= engine_settings(engine, ray_address) | {"workers": workers}
    base: dict[str, Any] = {}
    if index is not None:
        from gradsift.runs.indexes import index_settings

        base = index_settings(index)
    resolved, taken_over = resolve_config(config, flags, settings, base)
    if resolved.engine.executor != "ray" and (ray_address or workers):
        from gradsift.errors import ConfigError

        raise ConfigError("--ray-address and --workers are for Ray: give --engine ray as well")
    with log_to(output_dir):
        from gradsift.pipeline import run
        from gradsift.selection.policies import describe_policy
        from gradsift.selection.source_shares import source_shares

        result = run(resolved, output_dir, strict=strict, overwrite=overwrite)
    policy = [
        f"{words} (from {config})" if _is_taken_over(key, words, taken_over) else words
        for key, words in describe_policy(resolved.policy).items()
    ]
    in_pool = result.scores(["source"])["source"]
    shares = {
        target: source_shares(in_pool, selection.picks["source"])
        for target, selection in result.selections.items()
    }
    show(
        _document(result, output_dir, shares, sorted(taken_over)),
        partial(_print_result, result, output_dir, shares, policy),
    )


def _is_taken_over(key: str, words: str, taken_over: set[str]) -> bool:
    """Return whether the file decided what these words of a policy say; some say two settings."""
    similarity = "similarity" in taken_over and "Jaccard" in words
    turns = key == "strategy" and "per" in taken_over and "in turn" in words
    softmax = key == "weights" and "temperature" in taken_over and "temperature" in words
    return key in taken_over or similarity or turns or softmax


def _document(
    result: RunResult,
    location: str,
    shares: Mapping[str, Sequence[SourceShare]],
    taken_over: Sequence[str],
) -> dict[str, Any]:
    """Return what was picked as plain values."""
    selections = result.selections
    return {
        "run": location,
        "method": result.method,
        "policy": next(iter(selections.values())).policy.model_dump(),
        "policy_from_config": taken_over,
        "num_pool": result.num_pool,
        "num_rejected": result.num_rejected,
        "selections": {
            target: {
                "num_picks": len(selection.picks),
                "num_tokens": selection.num_tokens,
                "num_refused": len(selection.refused),
                "shortfall": selection.shortfall,
                "picks": path_in_run(location, layout.picks(selection.key)),
                "messages": path_in_run(location, layout.messages(selection.key)),
                "reasons": path_in_run(location, layout.reasons(selection.key)),
                "sources": shares[target],
            }
            for target, selection in selections.items()
        },
        "report": path_in_run(location, layout.REPORT),
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory,
    }


def _print_result(
    result: RunResult,
    location: str,
    shares: Mapping[str, Sequence[SourceShare]],
    policy: Sequence[str],
    console: Console,
) -> None:
    """Print the policy; what was picked for each target, and from where; files, time, memory."""
    console.print(f"policy: {'; '.join(policy)}", markup=False, highlight=False)
    for target, selection in result.selections.items():
        title = (
            f"{selection.key}: {len(selection.picks):,} picks of {result.num_pool:,} by "
            f"{result.method}, {selection.num_tokens:,} tokens"
        )
        console.print(_source_table(title, shares[target][:_SOURCES_SHOWN]))
        if selection.shortfall:
            console.print(f"short: {selection.shortfall}", style="yellow", markup=False)
        print_path(console, location, layout.picks(selection.key))
        print_path(console, location, layout.messages(selection.key))
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

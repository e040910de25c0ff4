"""`gradsift index`: sketch a pool once, so that any target can be asked for in seconds."""

from __future__ import annotations

from shlex import quote

from gradsift.cli.options import (
    Adapter,
    ConfigFile,
    Engine,
    Memory,
    Model,
    Overwrite,
    Pool,
    RandomSeed,
    RayAddress,
    RunFolder,
    Settings,
    Strict,
    WarmupMode,
    Workers,
    engine_settings,
    resolve_config,
    settings_of_flags,
)
from gradsift.cli.output import log_to, show


def index(
    run: RunFolder,
    model: Model = None,
    pool: Pool = [],  # noqa: B006
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
    """Sketch a pool's gradients in one pass that needs no target; `select --index` then asks it."""
    flags = settings_of_flags(model, pool, [], None, adapter, warmup, memory, seed)
    flags["engine"] |= engine_settings(engine, ray_address) | {"workers": workers}
    with log_to(run):
        from gradsift.indexing import make_index, settings_in

        resolved, _ = resolve_config(config, flags, settings, base=settings_in(run))
        make_index(resolved, run, strict=strict, overwrite=overwrite)
    asked = f"gradsift select --index {quote(run)} --target NAME=FILE --output-dir …"
    show({"index": run}, lambda console: console.print(f"→ {asked}", soft_wrap=True))

"""The options that several verbs share, and the settings that they stand for.

Typer reads an option's type, help and spelling from its `Annotated` type. The names of these
types are looked up when the app starts, so a verb's module imports them outside `TYPE_CHECKING`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from gradsift.types import MethodName

if TYPE_CHECKING:
    from gradsift.config import Config
    from gradsift.sections import Section


class Executor(StrEnum):
    """Where the work is done."""

    local = "local"
    ray = "ray"


class Warmup(StrEnum):
    """What precedes the measuring."""

    train = "train"
    none = "none"


class WeightKind(StrEnum):
    """What the weights of picks go by."""

    none = "none"
    rank = "rank"
    softmax = "softmax"


def _methods() -> list[str]:
    return [*get_args(MethodName)]


def _keys_of_a_run(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the settings of a run whose keys begin so, for the shell to complete."""
    from gradsift.config import Config

    yield from _keys_that_begin(incomplete, Config)


def _keys_of_an_evaluation(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the settings of an evaluation whose keys begin so, for the shell to complete."""
    from gradsift.evaluation.config import EvaluationConfig

    yield from _keys_that_begin(incomplete, EvaluationConfig)


def _keys_that_begin(incomplete: str, section: type[Section]) -> Iterator[tuple[str, str]]:
    from gradsift.sections import describe

    for found in describe(section):
        if found.key.startswith(incomplete):
            yield f"{found.key}=", found.description


OutputDir = Annotated[
    str, typer.Option(help="the run folder, also s3://bucket/run; the same one resumes")
]
Model = Annotated[str | None, typer.Option(help="a local folder or a Hub id")]
Pool = Annotated[list[str], typer.Option(help="file, glob, folder or Hub id; may be repeated")]
Target = Annotated[
    list[str], typer.Option(metavar="NAME=FILE", help="examples of the task; repeatable")
]
IndexFolder = Annotated[
    str | None,
    typer.Option(
        "--index", help="made by `gradsift index`: in place of --model and --pool, no pass"
    ),
]
Budget = Annotated[str | None, typer.Option(help="5%, 2000 or 3Mtok (default: 5%)")]
Name = Annotated[
    str | None, typer.Option(help="keep these picks beside others (else the unnamed are replaced)")
]
Weights = Annotated[
    WeightKind | None,
    typer.Option(help="a weight for each pick: by rank, or softmax of the scores (default: none)"),
]
Method = Annotated[
    str | None,
    typer.Option(
        help=f"how the pool is scored: {', '.join(get_args(MethodName))} (default: gist)",
        autocompletion=_methods,
    ),
]
RandomSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="seed of all that is drawn, by the warm-up, methods and the index",
    ),
]
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
ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML file of settings; flags and --set override it")
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE",
        help="any other setting; `gradsift settings` lists them",
        autocompletion=_keys_of_a_run,
    ),
]  # fmt: skip
EvaluationSettings = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE",
        help="any other setting; `gradsift settings evaluate` lists them",
        autocompletion=_keys_of_an_evaluation,
    ),
]  # fmt: skip
Strict = Annotated[bool, typer.Option(help="stop at the first unusable row")]
Overwrite = Annotated[bool, typer.Option(help="redo stages made with other settings")]


def settings_of_flags(
    model: str | None,
    pool: list[str],
    target: list[str],
    budget: str | None,
    adapter: str | None,
    warmup: Warmup | None,
    memory: str | None,
    seed: int | None,
) -> dict[str, Any]:
    """Return the settings that the flags stand for, by section."""
    return {
        "model": {"name": model},
        "data": {"pool": pool, "targets": parse_targets(target)},
        "policy": {"budget": budget},
        "warmup": {"adapter": adapter, "mode": warmup and warmup.value, "seed": seed},
        "less": {"seed": seed},
        "influence": {"seed": seed},
        "index": {"seed": seed},
        "target_path": {"seed": seed},
        "random": {"seed": seed},
        "engine": {"memory": memory},
    }


def engine_settings(engine: Executor | None, ray_address: str | None) -> dict[str, Any]:
    """Return the settings of the engine that flags stand for; another one forgets the address."""
    if engine is None:
        return {} if ray_address is None else {"ray_address": ray_address}
    return {"executor": engine.value, "ray_address": ray_address}


def parse_targets(targets: list[str]) -> dict[str, list[str]]:
    """Read NAME=FILE, or FILE alone under its stem; a name given twice joins its files.

    >>> parse_targets(["a/dev.jsonl", "x=b.jsonl", "x=c.jsonl"])
    {'dev': ['a/dev.jsonl'], 'x': ['b.jsonl', 'c.jsonl']}

    Raises:
        ConfigError: If a file without a name of its own would join others: is that meant?
    """
    from gradsift.config import target_name

    files: dict[str, list[str]] = {}
    unnamed: set[str] = set()
    for text in targets:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = target_name(text), text
            unnamed.add(name)
        files.setdefault(name, []).append(path)
    for name in unnamed:
        if len(files[name]) > 1:
            from gradsift.errors import ConfigError

            raise ConfigError(
                f"{' and '.join(files[name])} would be one target {name!r}; give each a name of "
                "its own as NAME=FILE, or all of them the same name to join them"
            )
    return files


def drop_unset(flags: dict[str, Any]) -> dict[str, Any]:
    """Return what was given, without the flags and sections that were not.

    >>> drop_unset({"model": {"name": None}, "policy": {"budget": "5%"}, "data": {"pool": []}})
    {'policy': {'budget': '5%'}}
    """
    inner = {k: drop_unset(v) if isinstance(v, dict) else v for k, v in flags.items()}
    return {key: value for key, value in inner.items() if value not in (None, "", [], {})}


def resolve_config(
    file: Path | None,
    flags: dict[str, Any],
    settings: list[str],
    base: Mapping[str, Any] | None = None,
) -> tuple[Config, set[str]]:
    """Return the whole configuration, and which settings of the policy the file decided.

    `--set` overrides the flags, these override the file, and that `base`. The name of a selection
    is never taken from a file: what is picked without `--name` is the unnamed one.

    Raises:
        ConfigError: If a setting is unknown, missing or out of range, or the file is unreadable.
    """
    from gradsift.config import Config, PolicyConfig
    from gradsift.sections import merge, parse_assignment, read_yaml

    in_file = read_yaml(file) if file else {}
    given = merge(drop_unset(flags), *map(parse_assignment, settings))
    config = Config.build(merge(base or {}, in_file, given))
    if config.policy.name and "name" not in given.get("policy", {}):
        policy = config.policy.model_copy(update={"name": None})
        config = config.model_copy(update={"policy": policy})
    usual, own = PolicyConfig(), config.policy
    of_file = PolicyConfig.model_fields.keys() - given.get("policy", {}).keys()
    taken_over = {key for key in of_file if getattr(own, key) != getattr(usual, key)}
    return config, taken_over

"""The index of a pool, as the runs see it that ask it: its settings, and what they take over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.config import Config
from gradsift.errors import RunError
from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.runs.hashing import digest
from gradsift.runs.opening import local_folder
from gradsift.runs.stage import Stage
from gradsift.sections import read_yaml

_AGAIN = "run `gradsift index` with it again"


@dataclass(frozen=True)
class AskedIndex:
    """The index that a run asks, which is read where it lies.

    `config`: what it was made with; `key` tells it from every other; `pool` is the stage that
    encoded its pool, `warmup` the fingerprint of that of its adapters.
    """

    run: Run
    config: Config
    key: str
    pool: Stage
    warmup: str


def ask_index(location: str | Path) -> AskedIndex:
    """Return the index in a folder.

    Raises:
        RunError: If it holds none.
    """
    run, name = Run(local_folder(location)), f"{layout.ENCODED}/{layout.POOL}"
    config = read_index_config(run, location)
    outputs = (layout.encoded(layout.POOL), layout.rejected(layout.POOL))
    try:
        encoding = {k: v for k, v in run.inputs_of(name).items() if k != "sources"}
        warmup, key = digest(run.inputs_of(layout.WARMUP))[:16], run.key(layout.INDEX)
    except RunError as error:
        raise RunError(f"the index in {location} is not finished ({error}): {_AGAIN}") from None
    return AskedIndex(run, config, key, Stage(name, encoding, outputs, cheap=True), warmup)


def index_settings(location: str | Path) -> dict[str, Any]:
    """Return the settings of a run that asks an index: those that are the index's own, and where.

    Raises:
        RunError: If the folder holds none.
    """
    config = read_index_config(Run(local_folder(location)), location)
    kept = config.model_dump(include={"model", "data", "lora", "warmup", "index"})
    del kept["data"]["targets"], kept["model"]["device"]
    kept["engine"] = config.engine.model_dump(include={"window", "shard_size"})
    kept["index"]["path"] = str(location)
    return kept


def read_index_config(run: Run, location: str | Path) -> Config:
    """Return the settings that the index in a folder was made with.

    Raises:
        RunError: If it holds none, or they are not as they were written.
    """
    path = run.path / layout.INDEX_CONFIG
    if not path.exists():
        raise RunError(f"{location} holds no index; make one there with `gradsift index`")
    if damage := run.damage(layout.INDEX_CONFIG):
        raise RunError(f"{damage}: {_AGAIN}")
    return Config.build(read_yaml(path))


def take_over(folder: Run, other: Run, stages: Iterable[Stage]) -> None:
    """Let a folder hold what another has of some stages, where it has not got them itself.

    Files are linked, or copied from another disk; a manifest comes after its files.
    """
    for stage in stages:
        if not folder.find_fault([stage]):
            continue
        folder.discard(stage)
        for name in (*stage.outputs, layout.manifest(stage.name)):
            _link(other.path / name, folder.path / name)
            folder.publish(folder.path / name)


def _link(source: Path, place: Path) -> None:
    for file in [source] if source.is_file() else sorted(source.rglob("*")):
        if file.is_file():
            to = place / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, to)
            except OSError:  # another disk
                shutil.copy2(file, to)

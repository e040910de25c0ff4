"""The stages that encode pool and targets, and what their results depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from gradsift.config import Config
from gradsift.data.sources import resolve
from gradsift.runs.stage import Stage


def data_sets(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the sources of the pool and of every target, by the name of their encoded set."""
    targets = {f"target.{name}": sources for name, sources in config.data.targets.items()}
    return {"pool": config.data.pool} | targets


def encoding_stages(
    config: Config, model: str, sets: Mapping[str, tuple[str, ...]], folder: str = "data"
) -> dict[str, Stage]:
    """Return the stages that encode some sets of sources into a folder.

    Raises:
        DataError: If a file is not there.
    """
    shared = config.data.model_dump(include={"max_length", "columns", "template"})
    shared["trust_remote_code"] = config.model.trust_remote_code  # of the tokenizer
    if config.data.template and Path(config.data.template).is_file():
        shared["template_hash"] = hashlib.sha256(
            Path(config.data.template).read_bytes()
        ).hexdigest()
    stages = {}
    for name, specs in sets.items():
        sources = enumerate(resolve(specs), start=1)  # their order is that of the rows
        files = {f"{number} {source.name}": source.fingerprint() for number, source in sources}
        outputs = (f"{folder}/{name}.parquet", f"{folder}/{name}.rejected.jsonl")
        settings = {"files": files, "tokenizer": model} | shared
        stages[name] = Stage(f"{folder}/{name}", settings, outputs, cheap=True)
    return stages

"""The stages that encode pool and targets: what their results depend on, and doing them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from gradsift.config import DataConfig
from gradsift.data.encoded import encode_set
from gradsift.data.groups import GroupEncoder
from gradsift.data.schemas import check_schemas
from gradsift.data.sources import log_contents, resolve
from gradsift.executors.base import Executor
from gradsift.runs import layout
from gradsift.runs.atomic import room_for
from gradsift.runs.folder import Run
from gradsift.runs.stage import Stage


def data_sets(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """Return the sources of the pool and of every target, by the name of their encoded set."""
    targets = {layout.target_set(name): sources for name, sources in data.targets.items()}
    return {layout.POOL: data.pool} | targets


def encoding_stages(
    data: DataConfig,
    model: str,
    trust_remote_code: bool,
    sets: Mapping[str, tuple[str, ...]],
    folder: str = layout.ENCODED,
) -> dict[str, Stage]:
    """Return the stages that encode some sets of sources into a folder.

    `model`: the identity of the model whose tokenizer is used.

    Raises:
        DataError: If a file is not there.
    """
    shared = data.model_dump(include={"max_length", "columns", "template"})
    shared["trust_remote_code"] = trust_remote_code
    if data.template and Path(data.template).is_file():
        content = Path(data.template).read_bytes()
        shared["template_hash"] = hashlib.sha256(content).hexdigest()
    stages = {}
    found = {name: resolve(specs) for name, specs in sets.items()}  # is all there? then hash it
    for name, sources in found.items():
        numbered = enumerate(sources, start=1)  # their order is that of the rows
        files = {f"{number} {source.name}": source.fingerprint() for number, source in numbered}
        outputs = (layout.encoded(name, folder), layout.rejected(name, folder))
        settings = {"files": files, "model": model} | shared
        stages[name] = Stage(f"{folder}/{name}", settings, outputs, cheap=True)
    return stages


def check_first_rows(sets: Mapping[str, tuple[str, ...]], columns: Mapping[str, str]) -> None:
    """Find out from the first rows whether all files of some sets are there and have a schema.

    Raises:
        DataError: If not.
    """
    for specs in sets.values():
        check_schemas(resolve(specs), columns)


def count_rows(specs: tuple[str, ...], at_most: int) -> int | None:
    """Return how many rows some sources have, or `at_most`; None for a Hub data set."""
    sources = resolve(specs)
    if any(source.kind == "hub" for source in sources):
        return None
    rows = (row for source in sources for row in source.rows())
    return sum(1 for _ in islice(rows, at_most))


def encode_sets(
    sets: Mapping[str, tuple[str, ...]],
    stages: Mapping[str, Stage],
    folder: Run,
    encode: GroupEncoder,
    strict: bool = False,
    executor: Executor | None = None,
) -> None:
    """Encode what is not encoded yet, each set as its stage says.

    The first rows of all files are looked at before anything is encoded, and the pool, which may
    take long, is encoded last: a fault of a target is told before. `executor`
    says in which processes a large set is encoded.

    Raises:
        DataError: If a set has no usable row, or any unusable one under `strict`.
    """
    todo = {name: own for name, own in sets.items() if folder.find_fault([stages[name]])}
    for specs in todo.values():
        log_contents(specs)
    check_first_rows(todo, encode.columns)
    for name in sorted(sets, key=lambda name: name == layout.POOL):
        path = folder.path / stages[name].outputs[0]
        with folder.stage(stages[name]) as is_to_do:
            if is_to_do:
                sources = resolve(sets[name])
                with room_for(path):
                    encode_set(name, sources, encode, path.parent, strict, executor)

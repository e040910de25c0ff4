"""A string that changes when the files behind a model, adapter or encoder change."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gradsift.errors import ModelError


def identity(name: str) -> str:
    """Return what tells this model or adapter from another under the same name.

    For a folder: a hash over its files, of large ones over pieces spread evenly, so that it takes
    no time with 100 GB of weights. For a Hub id: the commit.

    Raises:
        ModelError: If the name is neither a folder nor a model on the Hub.
    """
    if not Path(name).is_dir():
        if Path(name).is_absolute() or name.startswith("."):
            raise ModelError(f"no such folder: {name!r}")
        from transformers.utils.hub import cached_file

        try:  # into a folder that has the name of the commit
            return Path(str(cached_file(name, "config.json"))).parent.name
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the model {name!r}: {error}") from error
    piece, pieces = 1 << 16, 256  # 16 MiB of each file at most
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(name).rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(name).as_posix()} {size} ".encode())
        step = max(piece, size // pieces)
        with path.open("rb") as file:
            for start in [*range(0, size, step), max(size - piece, 0)]:
                file.seek(start)
                digest.update(file.read(piece))
    return digest.hexdigest()

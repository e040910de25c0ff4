"""Files that are either whole under their name or not there at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gradsift.errors import RunError, is_disk_full
from gradsift.runs import layout


def write_atomically(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file so that it is either whole under its name or not there at all.

    `content` is the bytes, or a function that writes a file at the path it is given.

    Raises:
        RunError: If the disk is full.
    """
    # of its own: another machine may be writing the same, in place of one that seemed dead
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{layout.PARTIAL}")
    try:
        with room_for(path):
            if callable(content):
                content(partial)
            else:
                partial.write_bytes(content)
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)  # safetensors would keep its files from everybody else
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Say it clearly when there is none left to write a file.

    Raises:
        RunError: If the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            if isinstance(error, SafetensorError):  # an error of the system, in its words
                raise OSError(str(error)) from error
            raise
        free = shutil.disk_usage(next(p for p in path.parents if p.is_dir())).free
        raise RunError(
            f"the disk is full: cannot write {path} ({free / 2**20:.1f} MiB are free, or no more "
            "files can be made); make room and run the same command again: what is finished is kept"
        ) from error

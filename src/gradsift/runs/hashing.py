"""Hashes of values and of files, and bringing files to the disk for good."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

HASH_THREADS = min(8, os.cpu_count() or 1)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_and_hash(path: Path) -> str:
    """Bring a file and its name to the disk, and return its hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with suppress(OSError):  # not every file system lets a folder be brought there
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return hash_file(path)


def hash_tensors(tensors: Mapping[str, np.ndarray], about: Any) -> str:
    """Return the SHA-256 of some tensors, and of what they are about."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.data if values.size else b"")
    return digest.hexdigest()

"""A run folder on another file system, by fsspec, and its copy on the disk of this machine.

All work is done on the copy. What is finished is published, file by file: a stage's outputs before
its manifest, each shard when it is written. Object stores show an object only when it is whole;
elsewhere a file is brought under another name and renamed. The copy may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from gradsift.errors import BusyError, RunError
from gradsift.runs import layout

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS, LEASE_SECONDS = 10.0, 60.0
"""Seconds between signs of life of the owner of a run, and without one until it counts as dead."""


_LOCAL = {
    layout.REMOTE_STATES,
    layout.LOCK,
    layout.OWNER,
    layout.REMOTE_LOCK,
}  # never published or brought
_WHOLE_AT_ONCE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "memory"}
_SHARD = re.compile(r"\d{10}\.safetensors")
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "modified")


def is_remote(location: str | Path) -> bool:
    """Return whether a run folder is named by a URL of another file system than this machine's.

    >>> is_remote("s3://bucket/run"), is_remote("runs/one"), is_remote("file:///runs/one")
    (True, False, False)
    """
    return "://" in str(location) and not str(location).startswith("file://")


def cache_folder() -> Path:
    """Return where what can be made again is kept: `GRADSIFT_CACHE`, else `~/.cache/gradsift`."""
    return Path(os.environ.get("GRADSIFT_CACHE") or "~/.cache/gradsift").expanduser()


class RemoteFolder:
    """A remote folder and its copy; what is the same on both sides is not transferred again."""

    def __init__(self, url: str, path: Path | None = None) -> None:
        """Take the folder of that URL, its copy in `path` or where all copies are.

        Raises:
            RunError: If fsspec knows no such file system.
        """
        self.url: str = url.rstrip("/")
        name = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        stem = re.sub(r"\W+", "-", self.url.partition("://")[2])
        self.path: Path = path or cache_folder() / f"{stem}-{name}"
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise RunError(f"cannot reach the run folder {url!r}: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.url, self.path)

    def fetch(self, name: str = "", shards: bool = True) -> None:
        """Download a file, or all under a folder, where they differ; perhaps without shards.

        Raises:
            RunError: If the folder cannot be reached.
        """
        for found, info in self._listed(name):
            if not shards and _SHARD.fullmatch(Path(found).name):
                continue
            if self._mark(found) == (_version(info), _state(self.path / found)):
                continue
            path = self.path / found
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}{layout.PARTIAL}")
            self._try(self._files.get_file, f"{self._root}/{found}", str(partial))
            partial.replace(path)
            self._set_mark(found, info, _state(path))

    def update(self) -> None:
        """Download everything, and remove from the copy what the remote folder does not have.

        Raises:
            RunError: If the folder cannot be reached, or holds files that are not a run's.
        """
        kept = {found for found, _ in self._listed("")}
        if kept and not any(found.startswith(f"{layout.MANIFESTS}/") for found in kept):
            raise RunError(
                f"{self.url} is not empty and is not a gradsift run; use another --output-dir"
            )
        for file in [path for path in self.path.rglob("*") if path.is_file()]:
            found = file.relative_to(self.path)
            if found.parts[0] not in _LOCAL and found.as_posix() not in kept:
                file.unlink()
        self.fetch()

    def publish(self, name: str = "") -> None:
        """Upload a file of the copy, or all under a folder, where they differ.

        Raises:
            RunError: If the folder cannot be written to.
        """
        path = self.path / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            found = file.relative_to(self.path)
            if (
                not file.is_file()
                or found.parts[0] in _LOCAL
                or file.suffix == layout.PARTIAL
                or file.name.startswith(".tmp")
            ):
                continue
            mark, state = self._mark(found.as_posix()), _state(file)
            if mark is None or mark[1] != state:
                self._put(file, f"{self._root}/{found.as_posix()}")
                info = self._try(self._files.info, f"{self._root}/{found.as_posix()}")
                self._set_mark(found.as_posix(), info, state)

    def remove(self, name: str) -> None:
        """Remove a file or folder of the remote folder."""
        self._try(self._files.invalidate_cache)
        if self._try(self._files.exists, f"{self._root}/{name}"):
            self._try(self._files.rm, f"{self._root}/{name}", recursive=True)

    def _put(self, file: Path, target: str) -> None:
        if self._whole_at_once:
            self._try(self._files.put_file, str(file), target)
        else:
            self._try(self._files.makedirs, target.rpartition("/")[0], exist_ok=True)
            partial = f"{target}.{uuid.uuid4().hex}{layout.PARTIAL}"
            self._try(self._files.put_file, str(file), partial)
            self._try(self._files.mv, partial, target)

    @property
    def _whole_at_once(self) -> bool:
        """Whether this is an object store: nothing is seen of what is not whole, no folder made."""
        protocol = self._files.protocol
        names = {protocol} if isinstance(protocol, str) else {*protocol}
        return not names.isdisjoint(_WHOLE_AT_ONCE)

    def _listed(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield names and facts of the files under a name."""
        self._try(self._files.invalidate_cache)
        where = f"{self._root}/{name}".rstrip("/")
        try:
            found = self._try(self._files.find, where, detail=True)
        except FileNotFoundError:
            return
        for path, info in found.items():
            inner = path[len(self._root) :].lstrip("/")
            ours = inner.partition("/")[0] not in _LOCAL and not inner.endswith(layout.PARTIAL)
            if inner and ours and info["type"] == "file":
                yield inner, info

    def _try(self, do: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return do(*args, **options)
        except (FileExistsError, FileNotFoundError):
            raise
        except _faults() as error:
            raise RunError(f"cannot use the run folder {self.url}: {error}") from error

    def _mark(self, name: str) -> tuple[str, str] | None:
        """Return the versions, there and here, of a file that was the same on both sides."""
        path = self.path / layout.REMOTE_STATES / name
        try:
            there, here = json.loads(path.read_text())
        except (FileNotFoundError, ValueError, TypeError):
            return None  # unknown: it is transferred again
        return there, here

    def _set_mark(self, name: str, info: dict[str, Any], state: str) -> None:
        path = self.path / layout.REMOTE_STATES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}{layout.PARTIAL}")
        partial.write_text(json.dumps([_version(info), state]))
        partial.replace(path)

    @contextmanager
    def lock(self) -> Iterator[str | None]:
        """Keep every other machine out for as long as this lasts; it is held by signs of life.

        The caller keeps other processes of this machine away from the copy. Yields a message
        if a dead owner was replaced.

        Raises:
            BusyError: If another machine has it.
        """
        me = {"host": platform.node(), "copy": str(self.path), "process": os.getpid()}
        me["token"] = uuid.uuid4().hex
        where = f"{self._root}/{layout.REMOTE_LOCK}"
        message = None
        if not self._whole_at_once:
            self._try(self._files.makedirs, self._root, exist_ok=True)
        while not self._claim(where, me):
            owner = self._owner(where)
            if owner is None:
                continue
            silent = time.time() - owner["at"]
            ours = (owner["host"], owner["copy"]) == (me["host"], me["copy"])
            if not ours and silent < LEASE_SECONDS:
                raise BusyError(
                    f"{self.url} is in use by process {owner['process']} on {owner['host']} (last "
                    f"sign of life {max(silent, 0):.0f} s ago); wait for it to end (or, if it "
                    f"died, {LEASE_SECONDS:.0f} s) or use another --output-dir"
                )
            message = f"the process that had {self.url} is gone; going on in its place"
            self._try(self._files.rm, where)
        stop = threading.Event()
        thread = threading.Thread(target=self._heartbeat, args=(where, me, stop), daemon=True)
        thread.start()
        try:
            yield message
        finally:
            stop.set()
            thread.join()
            owner = self._owner(where)
            if owner and owner["token"] == me["token"]:
                self._try(self._files.rm, where)

    def _claim(self, where: str, me: dict[str, Any]) -> bool:
        """Return whether the lock is ours now: created where there was none."""
        if self._owner(where) is not None:
            return False
        content = json.dumps(me | {"at": time.time()}).encode()
        try:
            self._try(self._files.pipe_file, where, content, mode="create")
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise RunError(f"cannot use the run folder {self.url}: {error}") from error
        owner = self._owner(where)
        return owner is not None and owner["token"] == me["token"]

    def _owner(self, where: str) -> dict[str, Any] | None:
        self._try(self._files.invalidate_cache)
        try:
            owner = json.loads(self._try(self._files.cat_file, where))
        except FileNotFoundError:
            return None
        except ValueError:
            owner = None
        if not isinstance(owner, dict) or not owner.keys() >= {"host", "copy", "process", "at"}:
            raise BusyError(
                f"{self.url}: the lock {where} cannot be read; remove it if no run is on"
            )
        return owner

    def _heartbeat(self, where: str, me: dict[str, Any], stop: threading.Event) -> None:
        last = time.time()
        while not stop.wait(HEARTBEAT_SECONDS):
            try:
                owner = self._owner(where)
                if owner is None or owner["token"] == me["token"]:
                    last = time.time()
                    content = json.dumps(me | {"at": last}).encode()
                    self._try(self._files.pipe_file, where, content)
                    continue
                reason = "another process has taken it over"
            except (RunError, ValueError) as error:
                reason = f"no sign of life could be given ({error})"
                if time.time() - last < LEASE_SECONDS:
                    logger.warning("%s: %s; trying again", self.url, reason)
                    continue
            logger.error("%s: %s; this process stops: what is finished is kept", self.url, reason)
            os._exit(1)


def _faults() -> tuple[type[Exception], ...]:
    """Return what a file system raises when it cannot be reached; that of S3 has its own kind."""
    boto = sys.modules.get("botocore.exceptions")
    return (OSError, boto.BotoCoreError) if boto else (OSError,)


def _version(info: dict[str, Any]) -> str:
    """Return what tells a remote file from what it was before."""
    return f"{[str(info[key]) for key in _VERSIONS if key in info]} {info['size']}"


def _state(path: Path) -> str:
    """Return what tells a file of the copy from what it was before."""
    if not path.exists():
        return ""
    facts = path.stat()
    return f"{facts.st_mtime_ns} {facts.st_size}"

"""Opening a run folder, here or elsewhere, and keeping every other process out of it."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gradsift.config import Config
from gradsift.errors import BusyError, RunError
from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.runs.remote import RemoteFolder, is_remote
from gradsift.sections import read_yaml

logger = logging.getLogger(__name__)


@contextmanager
def locked_run(location: str | Path) -> Iterator[Run]:
    """Open a run folder, making it if need be, and keep every other process out of it.

    `location`: a path, or a URL that fsspec knows (`s3://bucket/run`).

    Raises:
        RunError: If another process has it, or it holds files that are not a run's.
    """
    if not is_remote(location):
        with _locked(local_folder(location)) as path:
            yield Run(path)
        return
    remote = RemoteFolder(str(location))
    with _locked(remote.path, is_copy=True) as path, remote.lock() as news:
        remote.update()
        if news:
            logger.info(news)
        try:
            yield Run(path, remote)
        finally:
            remote.publish()


@contextmanager
def _locked(path: Path, is_copy: bool = False) -> Iterator[Path]:
    try:
        str(path).encode()
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        others = names - {layout.LOCK, layout.GIVEN}
        if not is_copy and others and not names & {layout.OWNER, layout.MANIFESTS}:
            raise RunError(
                f"{path} is not empty and is not a gradsift run; use another --output-dir"
            )
        lock = FileLock(path / layout.LOCK, blocking=False)
        lock.acquire()
    except FileExistsError:
        raise RunError(f"{path} is a file; expected a folder for the run") from None
    except UnicodeEncodeError:
        raise RunError(f"the name of the run folder {str(path)!r} is not UTF-8") from None
    except Timeout:
        owner = path / layout.OWNER
        holder = owner.read_text(errors="replace") if owner.exists() else "another process"
        raise BusyError(
            f"{path} is in use by {holder}; wait for it to end or use another --output-dir"
        ) from None
    except OSError as error:
        raise RunError(f"cannot write to the run folder {path}: {error}") from None
    try:
        (path / layout.OWNER).write_text(f"process {os.getpid()} on {platform.node()}")
        for pattern in (
            f"*{layout.PARTIAL}",
            ".tmp??????",
        ):  # of a process that was killed while writing
            for partial in path.rglob(pattern):
                partial.unlink(missing_ok=True)
        yield path
    except OSError:
        if (path / layout.OWNER).exists():
            raise
        raise RunError(
            f"the run folder {path} was removed while it was worked in; run the same command again"
        ) from None
    finally:
        lock.release()


def local_folder(location: str | Path, fetch: bool = True) -> Path:
    """Return the run folder as a path here: itself, or an up-to-date copy of a remote one.

    Raises:
        RunError: If it cannot be reached.
    """
    if not isinstance(location, str | Path) or not str(location).strip():
        found = repr(location) if location else "nothing in its place"
        raise RunError(f"expected the path or URL of a run folder, found {found}")
    if not is_remote(location):
        return Path(str(location).removeprefix("file://"))
    remote = RemoteFolder(str(location))
    if fetch:
        try:
            with _locked(remote.path, is_copy=True):
                remote.fetch()
        except BusyError:
            logger.info("another process is at work on the copy of %s in %s", location, remote.path)
    return remote.path


def read_config(location: str | Path) -> Config:
    """Return the configuration of a finished or begun run.

    Raises:
        RunError: If the folder is not a run, or its configuration is not as it was written.
    """
    path = local_folder(location)
    if not (path / layout.CONFIG).exists():
        raise RunError(f"{location} is not a gradsift run: it has no {layout.CONFIG}")
    if damage := Run(path).damage(layout.CONFIG):
        raise RunError(
            f"{damage}, or was edited; run `gradsift select` with its settings again (an edited "
            f"one: with --config {path / layout.CONFIG}): what is finished is kept"
        )
    return Config.build(read_yaml(path / layout.CONFIG))

"""The run folder: stages with manifests, atomic files, one process at a time.

A stage's manifest holds all that its result depends on. It is written before the work begins, and
again, marked complete, when the work is done. A complete stage with the same manifest is not run
again; one that differs is named, with the difference.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gradsift.config import Config, read_yaml
from gradsift.errors import BusyError, ModelError, RunError
from gradsift.mirror import Mirror, is_remote
from gradsift.types import Checkpoint

logger = logging.getLogger(__name__)

OPTIMIZER_STATE = "optimizer.safetensors"
"""Where Adam's moments lie in the folder of an adapter."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PACKAGES = ("gradsift", "torch", "transformers", "peft", "datasets", "numpy", "pyarrow")


@dataclass(frozen=True)
class Stage:
    """A step of a run: its name, all that its result depends on, and the paths that it writes.

    A `cheap` stage is simply done again when it differs; so is any that broke off, unless it
    `keeps_parts` from which it would have gone on.
    """

    name: str
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    cheap: bool = False
    keeps_parts: bool = False

    @property
    def fingerprint(self) -> str:
        """A hash of the inputs, by which later stages depend on this one."""
        text = json.dumps(self.inputs, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Run:
    """An open run folder; use `open_run`.

    Where it lies on another file system, `path` is its copy here: what is finished is published,
    and what other machines have finished is fetched.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path = path
        self._mirror = mirror
        self._opened_on = platform.node()

    def publish(self, path: Path) -> None:
        """Let other machines see what lies at this path."""
        if self._mirror:
            self._mirror.publish(self._name(path))

    def fetch(self, path: Path) -> None:
        """Bring what other machines left at this path."""
        if self._mirror:
            self._mirror.fetch(self._name(path))

    def fetch_inputs(self) -> None:
        """Bring what a worker begins with, on another machine than that which opened the folder."""
        if self._mirror and self._opened_on != platform.node():
            self._mirror.fetch(shards=False)

    def remove(self, path: Path) -> None:
        """Remove a file or folder."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if self._mirror:
            self._mirror.remove(self._name(path))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def prepare(self, stages: Iterable[Stage], overwrite: bool = False) -> None:
        """Compare every stage with what the folder holds, before any work.

        Raises:
            RunError: If that would cost work, unless `overwrite`: it names the stage, and the
                first difference, which may lie in an earlier stage.
        """
        reason = ""
        for stage in stages:
            manifest = self._manifest(stage.name)
            if manifest is None or not (told := _told(manifest, stage)):
                continue
            reason = reason or f"{stage.name}: {told}"
            costly = not stage.cheap and (manifest["complete"] or stage.keeps_parts)
            if costly and not overwrite:
                raise RunError(
                    f"{self.path} holds the stage {stage.name!r} made with other settings "
                    f"({reason}). To keep its settings but for some, start from its own with "
                    f"--config {self.path / 'config.yaml'}; else use another --output-dir, or "
                    "--overwrite to do it again"
                )

    @contextmanager
    def stage(self, stage: Stage, whole: bool = True) -> Iterator[bool]:
        """Yield whether the stage is still to do; mark it complete when the block ends well.

        It is where its manifest says so and its outputs are there and `whole`. What it left with
        other inputs is removed first.
        """
        manifest = self._manifest(stage.name)
        if manifest and (told := _told(manifest, stage)):
            logger.info("%s is done again: %s", stage.name, told)
            self._remove(stage, manifest)
            manifest = None
        whole = whole and all((self.path / output).exists() for output in stage.outputs)
        if manifest and manifest["complete"] and whole:
            logger.info("%s: already done", stage.name)
            yield False
            return
        self._write_manifest(stage, complete=False)
        started = time.perf_counter()
        yield True
        seconds = time.perf_counter() - started
        for output in stage.outputs:
            self.publish(self.path / output)
        self._write_manifest(
            stage,
            complete=True,
            seconds=round(seconds, 3),
            resumed=manifest is not None,
            peak_memory_bytes=peak_memory(),
            versions=_versions(),
        )
        logger.info("%s: %.1f s", stage.name, seconds)

    def holds(self, stage: Stage) -> bool:
        """Return whether a stage is complete, with these very inputs."""
        manifest = self._manifest(stage.name)
        return manifest is not None and manifest["complete"] and not _told(manifest, stage)

    def facts(self, stages: Iterable[Stage]) -> dict[str, dict[str, Any]]:
        """Return the manifests of the complete stages: `seconds`, `peak_memory_bytes` and so on."""
        manifests = {stage.name: self._manifest(stage.name) for stage in stages}
        return {name: m for name, m in manifests.items() if m and m["complete"]}

    def write_config(self, config: Config) -> None:
        """Keep the resolved configuration."""
        write_atomically(self.path / "config.yaml", config.to_yaml().encode())
        self.publish(self.path / "config.yaml")

    def _manifest(self, name: str) -> dict[str, Any] | None:
        path = self.path / "manifests" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _write_manifest(self, stage: Stage, **facts: Any) -> None:
        manifest = {"stage": stage.name, "inputs": stage.inputs, **facts}
        path = self.path / "manifests" / f"{stage.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(manifest, indent=2).encode())
        self.publish(path)

    def _remove(self, stage: Stage, manifest: Mapping[str, Any]) -> None:
        """Remove a stage's outputs; broken off in between, it is what it was, but incomplete."""
        path = self.path / "manifests" / f"{stage.name}.json"
        write_atomically(path, json.dumps({**manifest, "complete": False}).encode())
        self.publish(path)
        for output in stage.outputs:
            self.remove(self.path / output)
        self.remove(path)


@contextmanager
def open_run(location: str | Path) -> Iterator[Run]:
    """Open a run folder, making it if need be, and keep every other process out of it.

    `location`: a path, or a URL that fsspec knows (`s3://bucket/run`).

    Raises:
        RunError: If another process has it, or it holds files that are not a run's.
    """
    if not is_remote(location):
        with _locked(local_folder(location)) as path:
            yield Run(path)
        return
    mirror = Mirror(str(location))
    with _locked(mirror.path, is_copy=True) as path, mirror.lock() as told:
        mirror.update()
        if told:
            logger.info(told)
        try:
            yield Run(path, mirror)
        finally:
            mirror.publish()


@contextmanager
def _locked(path: Path, is_copy: bool = False) -> Iterator[Path]:
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; expected a folder for the run")
    names = {entry.name for entry in path.iterdir()} - {".lock"} if path.exists() else set()
    if names and ".owner" not in names and not is_copy:
        raise RunError(f"{path} is not empty and is not a gradsift run; use another --output-dir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock", blocking=False)
        lock.acquire()
    except Timeout:
        owner = (path / ".owner").read_text() if (path / ".owner").exists() else "another process"
        raise BusyError(
            f"{path} is in use by {owner}; wait for it to end or use another --output-dir"
        ) from None
    except OSError as error:
        raise RunError(f"cannot write to the run folder {path}: {error}") from None
    try:
        (path / ".owner").write_text(f"process {os.getpid()} on {platform.node()}")
        yield path
    finally:
        lock.release()


def local_folder(location: str | Path, fetch: bool = True) -> Path:
    """Return the run folder as a path here: itself, or an up-to-date copy of a remote one.

    Raises:
        RunError: If it cannot be reached.
    """
    if not is_remote(location):
        return Path(str(location).removeprefix("file://"))
    mirror = Mirror(str(location))
    if fetch:
        try:
            with _locked(mirror.path, is_copy=True):
                mirror.fetch()
        except BusyError:
            logger.info("another process is at work on the copy of %s in %s", location, mirror.path)
    return mirror.path


def read_config(location: str | Path) -> Config:
    """Return the configuration of a finished or begun run.

    Raises:
        RunError: If the folder is not a run.
    """
    path = local_folder(location) / "config.yaml"
    if not path.exists():
        raise RunError(f"{location} is not a gradsift run: it has no config.yaml")
    return Config.build(read_yaml(path))


def write_atomically(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file so that it is either whole under its name or not there at all.

    `content` is the bytes, or a function that writes a file at the path it is given.

    Raises:
        RunError: If the disk is full.
    """
    # of its own: another machine may be writing the same, in place of one that seemed dead
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
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
        if getattr(error, "errno", None) not in _FULL and "No space left" not in str(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise RunError(
            f"the disk is full: cannot write {path} ({free / 2**20:.1f} MiB are free); make room "
            "and run the same command again: what is finished is kept"
        ) from error


def write_checkpoints(directory: Path, weights: Mapping[str, float]) -> None:
    """Keep the labels of a warm-up's adapters, each a folder beside, and how much each counts."""
    write_atomically(directory / "checkpoints.json", json.dumps(weights).encode())


def read_checkpoints(directory: Path) -> list[Checkpoint]:
    """Return the adapters that a warm-up left, their weights summing to 1."""
    weights = json.loads((directory / "checkpoints.json").read_text(encoding="utf-8"))
    total = sum(weights.values())
    return [Checkpoint(label, directory / label, w / total) for label, w in weights.items()]


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
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(name)._commit_hash or name
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


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins with the peak of the process that began this one
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def _told(manifest: Mapping[str, Any], stage: Stage) -> str:
    """Return how a stage differs from the one that was done; nothing if it does not."""
    return "; ".join(_differences(manifest["inputs"], json.loads(json.dumps(stage.inputs))))


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{path}.{key}" if path else key
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{path} was {json.dumps(old)}, is now {json.dumps(new)}"

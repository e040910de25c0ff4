"""The run folder: stages with manifests, atomic files, one process at a time.

A stage's manifest holds all that its result depends on. It is written before the work begins, and
again, marked complete and with the hash of every output, when the work is done. A complete stage
with the same manifest is not run again; one that differs is named, with the difference; one whose
outputs are damaged or gone is named too, and done again. Shards of a pass over the pool carry
hashes of their own, because they are kept before their stage is complete.
"""

from __future__ import annotations

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from gradsift.config import Config, read_yaml
from gradsift.errors import BusyError, ModelError, RunError, is_full
from gradsift.mirror import Mirror, is_remote
from gradsift.types import Checkpoint

logger = logging.getLogger(__name__)

OPTIMIZER_STATE = "optimizer.safetensors"
"""Where Adam's moments lie in the folder of an adapter."""
CONFIG = "config.yaml"
_READ_BY_NONE = ("/log.json", ".rejected.jsonl")  # outputs on which no later stage depends
_MANIFESTS, _OWNER = "manifests", ".owner"
HASH_THREADS = min(8, os.cpu_count() or 1)
_PACKAGES = ("gradsift", "torch", "transformers", "peft", "datasets", "numpy", "pyarrow")


@dataclass(frozen=True)
class Stage:
    """A step of a run: its name, the settings it depends on, and the paths that it writes.

    `sources`: the stages whose outputs it reads. A `cheap` stage is simply done again when it
    differs; so is any that broke off, unless it `keeps_parts` from which it would have gone on.
    """

    name: str
    settings: Mapping[str, Any]
    outputs: tuple[str, ...]
    sources: tuple[Stage, ...] = ()
    cheap: bool = False
    keeps_parts: bool = False

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All that the result depends on, known before any work."""
        sources = {source.name: source.fingerprint for source in self.sources}
        return json.loads(json.dumps({**self.settings, "sources": sources}))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the inputs, by which later stages depend on this one."""
        return _digest(self.inputs)[:16]


class Run:
    """An open run folder; use `open_run`.

    Where it lies on another file system, `path` is its copy here: what is finished is published,
    and what other machines have finished is fetched.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path = path
        self.intact: set[Path] = set()  # what was checked, or written, by this process
        self._unreadable: set[Path] = set()  # manifests, each told once
        self._relied_on: set[str] = set()  # stages that were found whole or done
        self._mirror = mirror
        self._opened_on = platform.node()

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self.path, self._mirror, self._opened_on, self._relied_on)
        return _at_another_process, given

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
            for name in sorted(self._relied_on):
                manifest = self._manifest(name)
                if manifest is None:
                    continue
                for path in self._damaged(manifest):  # perhaps here alone
                    path.unlink(missing_ok=True)
                    self._mirror.fetch(self._name(path))
                if damage := self._damage(manifest):
                    raise RunError(f"{damage} on {platform.node()}; run the same command again")

    def remove(self, path: Path) -> None:
        """Remove a file or folder."""
        self.intact = {p for p in self.intact if not p.is_relative_to(path)}
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
                    f"--config {self.path / CONFIG}; else use another --output-dir, or "
                    "--overwrite to do it again"
                )

    @contextmanager
    def stage(self, stage: Stage, whole: bool = True) -> Iterator[bool]:
        """Yield whether the stage is still to do; mark it complete when the block ends well.

        It is where its manifest says so, its outputs are as they were written, what it was made
        from is still there, and it is `whole`. What it left otherwise is removed first.
        """
        manifest, made_from = self._manifest(stage.name), self._contents(stage.sources)
        if manifest:
            told = _told(manifest, stage) or _replaced(manifest, made_from)
            damage = "" if told or not manifest["complete"] else self._damage(manifest)
            if told or damage:
                chosen = not damage and _told(manifest, stage)  # by the user
                log = logger.info if chosen else logger.warning
                log("%s is done again: %s", stage.name, told or damage)
                self._remove(stage, manifest)
                manifest = None
        elif any((self.path / output).exists() for output in stage.outputs):
            gone = self.path / _MANIFESTS / f"{stage.name}.json"
            logger.warning("%s is gone or damaged: %s is done again", gone, stage.name)
        if manifest and manifest["complete"] and whole:
            logger.info("%s: already done", stage.name)
            self._relied_on.add(stage.name)
            yield False
            return
        begun = {"stage": stage.name, "inputs": stage.inputs, "made_from": made_from}
        self._write_manifest(stage.name, begun | {"complete": False, "outputs": {}})
        for output in () if stage.keeps_parts else stage.outputs:
            if (self.path / output).exists():
                self.remove(self.path / output)
        started = time.perf_counter()
        yield True
        seconds = time.perf_counter() - started
        hashes = {} if stage.keeps_parts else self._seal(stage.outputs)
        for output in stage.outputs:
            self.publish(self.path / output)
        done = {
            "complete": True,
            "outputs": hashes,
            "seconds": round(seconds, 3),
            "resumed": manifest is not None,
            "peak_memory_bytes": peak_memory(),
            "versions": _versions(),
        }
        self._write_manifest(stage.name, begun | done)
        self._relied_on.add(stage.name)
        logger.info("%s: %.1f s", stage.name, seconds)

    def find_fault(self, stages: Iterable[Stage]) -> str:
        """Return why a stage is not there as it is planned; nothing if all of them are."""
        for stage in stages:
            manifest = self._manifest(stage.name)
            if manifest is None or not manifest["complete"]:
                return f"{stage.name} is not done"
            told = _told(manifest, stage) or _replaced(manifest, self._contents(stage.sources))
            if told:
                return f"{stage.name} is not as it is to be: {told}"
            if damage := self._damage(manifest):
                return damage
        return ""

    def key(self, name: str) -> str:
        """Return what every shard of a stage is marked with: by it another run's is told."""
        manifest = self._manifest(name)
        if manifest is None:
            raise RunError(f"{self.path} has no stage {name!r}; run `gradsift select` with it")
        return _digest([manifest["inputs"], manifest["made_from"]])[:16]

    def facts(self, stages: Iterable[Stage]) -> dict[str, dict[str, Any]]:
        """Return the manifests of the complete stages: `seconds`, `peak_memory_bytes` and so on."""
        manifests = {stage.name: self._manifest(stage.name) for stage in stages}
        return {name: m for name, m in manifests.items() if m and m["complete"]}

    def write_config(self, config: Config) -> None:
        """Keep the resolved configuration."""
        write_atomically(self.path / CONFIG, config.to_yaml().encode())
        hashes = self._seal((CONFIG,))
        self.publish(self.path / CONFIG)
        done = {"stage": CONFIG, "inputs": {}, "made_from": {}, "complete": True}
        self._write_manifest(CONFIG, done | {"outputs": hashes})

    def damage(self, name: str) -> str:
        """Return what is wrong with what was kept under this name, nothing if nothing is."""
        manifest = self._manifest(name)
        return self._damage(manifest) if manifest and manifest["complete"] else ""

    def has_manifest(self, name: str) -> bool:
        """Return whether something was kept under this name, and its manifest can be read."""
        return self._manifest(name) is not None

    def _manifest(self, name: str) -> dict[str, Any] | None:
        """Return what a stage's manifest says; one that is not as it was written is none."""
        path = self.path / _MANIFESTS / f"{name}.json"
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest.pop("sha256") == _digest(manifest) and manifest["stage"] == name:
                return manifest
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            pass
        if path not in self._unreadable:
            logger.warning("%s is damaged, or of an earlier version: it counts as not there", path)
            self._unreadable.add(path)
        return None

    def _write_manifest(self, name: str, manifest: Mapping[str, Any]) -> None:
        if not (self.path / _OWNER).exists():
            raise RunError(
                f"the run folder {self.path} was removed while it was worked in; run the same "
                "command again"
            )
        path = self.path / _MANIFESTS / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2)
        write_atomically(path, content.encode())
        self.publish(path)

    def _contents(self, stages: Iterable[Stage]) -> dict[str, str | None]:
        """Return what tells the outputs of some stages from others of the same settings."""
        return {stage.name: _content(self._manifest(stage.name)) for stage in stages}

    def _seal(self, outputs: Iterable[str]) -> dict[str, str]:
        """Bring outputs to the disk for good, and return the hash of each of their files."""
        paths = [path for output in outputs for path in _files(self.path / output)]
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            hashes = [*threads.map(_synced_hash, paths)]
        self.intact |= {*paths}
        return {self._name(path): digest for path, digest in zip(paths, hashes, strict=True)}

    def _damage(self, manifest: Mapping[str, Any]) -> str:
        """Return which outputs of a stage are not as they were written, nothing if none."""
        damaged = self._damaged(manifest)
        return "; ".join(f"{path} is {'damaged' if path.is_file() else 'gone'}" for path in damaged)

    def _damaged(self, manifest: Mapping[str, Any]) -> list[Path]:
        expected = {self.path / name: digest for name, digest in manifest["outputs"].items()}
        looked_at = [path for path in expected if path not in self.intact]
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            found = [*threads.map(lambda p: _hash(p) if p.is_file() else None, looked_at)]
        pairs = zip(looked_at, found, strict=True)
        damaged = [path for path, digest in pairs if digest != expected[path]]
        self.intact |= {*looked_at} - {*damaged}
        return damaged

    def _remove(self, stage: Stage, manifest: Mapping[str, Any]) -> None:
        """Remove a stage's outputs; broken off in between, it is what it was, but incomplete."""
        self._write_manifest(stage.name, {**manifest, "complete": False})
        for output in stage.outputs:
            self.remove(self.path / output)
        self.remove(self.path / _MANIFESTS / f"{stage.name}.json")


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
    try:
        str(path).encode()
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if not is_copy and names - {".lock"} and not names & {_OWNER, _MANIFESTS}:
            raise RunError(
                f"{path} is not empty and is not a gradsift run; use another --output-dir"
            )
        lock = FileLock(path / ".lock", blocking=False)
        lock.acquire()
    except FileExistsError:
        raise RunError(f"{path} is a file; expected a folder for the run") from None
    except UnicodeEncodeError:
        raise RunError(f"the name of the run folder {str(path)!r} is not UTF-8") from None
    except Timeout:
        owner = path / _OWNER
        told = owner.read_text(errors="replace") if owner.exists() else "another process"
        raise BusyError(
            f"{path} is in use by {told}; wait for it to end or use another --output-dir"
        ) from None
    except OSError as error:
        raise RunError(f"cannot write to the run folder {path}: {error}") from None
    try:
        (path / _OWNER).write_text(f"process {os.getpid()} on {platform.node()}")
        for pattern in ("*.partial", ".tmp??????"):  # of a process that was killed while writing
            for partial in path.rglob(pattern):
                partial.unlink(missing_ok=True)
        yield path
    except OSError:
        if (path / _OWNER).exists():
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
        RunError: If the folder is not a run, or its configuration is not as it was written.
    """
    path = local_folder(location)
    if not (path / CONFIG).exists():
        raise RunError(f"{location} is not a gradsift run: it has no {CONFIG}")
    if damage := Run(path).damage(CONFIG):
        raise RunError(
            f"{damage}, or was edited; run `gradsift select` with its settings again (an edited "
            f"one: with --config {path / CONFIG}): what is finished is kept"
        )
    return Config.build(read_yaml(path / CONFIG))


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
        if not is_full(error):
            if isinstance(error, SafetensorError):  # an error of the system, in its words
                raise OSError(str(error)) from error
            raise
        free = shutil.disk_usage(next(p for p in path.parents if p.is_dir())).free
        raise RunError(
            f"the disk is full: cannot write {path} ({free / 2**20:.1f} MiB are free, or no more "
            "files can be made); make room and run the same command again: what is finished is kept"
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


def _at_another_process(
    path: Path, mirror: Mirror | None, opened_on: str, relied_on: set[str]
) -> Run:
    """Return a run folder for a worker, which has checked nothing yet."""
    run = Run(path, mirror)
    run._opened_on, run._relied_on = opened_on, relied_on
    return run


def _files(path: Path) -> list[Path]:
    """Return the finished files of an output, itself or all under it."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [file for file in found if file.suffix != ".partial"]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced_hash(path: Path) -> str:
    """Bring a file and its name to the disk, and return its hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with suppress(OSError):  # not every file system lets a folder be brought there
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return _hash(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _content(manifest: Mapping[str, Any] | None) -> str | None:
    """Return what tells the outputs of a stage from others of the same settings."""
    if manifest is None:
        return None
    outputs = {n: h for n, h in manifest["outputs"].items() if not n.endswith(_READ_BY_NONE)}
    return _digest(outputs or [manifest["inputs"], manifest["made_from"]])[:16]


def _told(manifest: Mapping[str, Any], stage: Stage) -> str:
    """Return how a stage differs from the one that was done; nothing if it does not."""
    old, new = dict(manifest["inputs"]), dict(stage.inputs)
    before, now = old.pop("sources", {}), new.pop("sources", {})
    told = [*_differences(old, new)]
    if not told:
        told = [
            f"{name} changed" for name in {**before, **now} if before.get(name) != now.get(name)
        ]
    return "; ".join(told)


def _replaced(manifest: Mapping[str, Any], made_from: Mapping[str, str | None]) -> str:
    """Return which of the stages that it was made from are not what they were."""
    before = manifest["made_from"]
    return "; ".join(
        f"{name} was made anew and is not what it was"
        for name in made_from
        if before.get(name) != made_from[name]
    )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{path}.{key}" if path else key
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{path} was {json.dumps(old)}, is now {json.dumps(new)}"

"""The run folder: stages that are done once, each with a manifest that says what it depends on.

A manifest is written before the work begins, and again, marked complete and with the hash of every
output, when the work is done. A complete stage with the same manifest is not run again; one that
differs is named, with the difference; one whose outputs are damaged or gone is named too, and done
again. Shards of a pass over the pool carry hashes of their own, because they are kept before their
stage is complete.
"""

from __future__ import annotations

import logging
import platform
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.config import Config
from gradsift.errors import RunError
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.hashing import digest
from gradsift.runs.manifests import (
    Manifest,
    Manifests,
    describe_change,
    describe_replaced,
    differs_by,
)
from gradsift.runs.provenance import package_versions, peak_memory
from gradsift.runs.remote import RemoteFolder
from gradsift.runs.stage import Stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Todo:
    """The beginning of a stage's manifest; whether it broke off before, after so many seconds."""

    begun: dict[str, Any]
    seconds_before: float
    resumed: bool


class Run:
    """An open run folder; use `locked_run`.

    Where it lies on another file system, `path` is its copy here: what is finished is published,
    and what other machines have finished is fetched.
    """

    def __init__(self, path: Path, remote: RemoteFolder | None = None) -> None:
        self.path = path
        self._manifests = Manifests(path)
        self._relied_on: set[str] = set()  # stages found complete, or completed: workers read them
        self._remote = remote
        self._opened_on = platform.node()

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self.path, self._remote, self._opened_on, self._relied_on)
        return _at_another_process, given

    @property
    def location(self) -> str:
        """The folder as its user named it: a path or a URL."""
        return self._remote.url if self._remote else str(self.path)

    @property
    def intact(self) -> set[Path]:
        """The files that this process checked or wrote, and need not look at again."""
        return self._manifests.intact

    def publish(self, path: Path) -> None:
        """Let other machines see what lies at this path."""
        if self._remote:
            self._remote.publish(self._name(path))

    def fetch(self, path: Path) -> None:
        """Bring what other machines left at this path."""
        if self._remote:
            self._remote.fetch(self._name(path))

    def fetch_inputs(self) -> None:
        """Bring what a worker begins with, on another machine than that which opened the folder."""
        if self._remote and self._opened_on != platform.node():
            self._remote.fetch(shards=False)
            for name in sorted(self._relied_on):
                manifest = self._manifests.read(name)
                if manifest is None:
                    continue
                for path in self._manifests.damaged(manifest):  # perhaps here alone
                    path.unlink(missing_ok=True)
                    self._remote.fetch(self._name(path))
                if damage := self._manifests.damage(manifest):
                    raise RunError(f"{damage} on {platform.node()}; run the same command again")

    def remove(self, path: Path) -> None:
        """Remove a file or folder."""
        self.intact.difference_update([p for p in self.intact if p.is_relative_to(path)])
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if self._remote:
            self._remote.remove(self._name(path))

    def prepare(
        self,
        stages: Iterable[Stage],
        overwrite: bool | None = None,
        may_change: Iterable[str] = (),
    ) -> None:
        """Compare every stage with what the folder holds, before any work.

        `overwrite`: whether `--overwrite` was given, None for a command that has no such flag.
        `may_change`: the names of stages that may be others than before, and so may all that
        differs by them alone.

        Raises:
            RunError: If that would cost work, unless `overwrite`: it names the stage, and the
                first difference, which may lie in an earlier stage.
        """
        reason, allowed = "", {*may_change}
        for stage in stages:
            manifest = self._manifests.read(stage.name)
            if manifest is None or not (change := describe_change(manifest, stage)):
                continue
            if stage.name in allowed or differs_by(manifest, stage, allowed):
                allowed.add(stage.name)
                continue
            reason = reason or f"{stage.name}: {change}"
            costly = not stage.cheap and (manifest["complete"] or stage.keeps_parts)
            if costly and not overwrite:
                again = f"--config {shlex.quote(str(self.path / layout.CONFIG))}"
                advice = (
                    f"Bring back what changed, or let `gradsift select {again} --output-dir "
                    f"{shlex.quote(self.location)} --overwrite` do it again"
                    if overwrite is None
                    else "To keep it, give the old value again (a setting: --set KEY=OLD); to keep "
                    f"all settings but some, start from its own with {again}; else use another "
                    "--output-dir, or --overwrite to do it again"
                )
                raise RunError(
                    f"{self.path} holds the stage {stage.name!r} made with other settings "
                    f"({reason}). {advice}"
                )

    @contextmanager
    def stage(self, stage: Stage, whole: bool = True) -> Iterator[bool]:
        """Yield whether the stage is still to do; mark it complete when the block ends well.

        It is done if its manifest is complete and unchanged, its outputs and those of the stages
        that it was made from are as they were written, and `whole` is true. Otherwise what it
        stored is removed first (unless it broke off and `keeps_parts`).
        """
        with self.stages([(stage, whole)]) as [todo]:
            yield todo

    @contextmanager
    def stages(self, stages: Sequence[tuple[Stage, bool]]) -> Iterator[list[bool]]:
        """Yield which of some stages are still to do, each as in `stage`; one work does them all.

        Its seconds are shared out equally. None of them is made from another.
        """
        found = [self._find(stage, whole) for stage, whole in stages]
        todo = [(stage, own) for (stage, _), own in zip(stages, found, strict=True) if own]
        for stage, own in todo:
            own.begun["among"] = len(todo)
            self._begin(stage, own)
        started = time.perf_counter()
        yield [own is not None for own in found]
        seconds = (time.perf_counter() - started) / max(1, len(todo))
        for stage, own in todo:
            self._finish(stage, own, seconds)

    def _find(self, stage: Stage, whole: bool) -> _Todo | None:
        """Return what a stage begins with, nothing if done; what cannot be kept is removed."""
        found, made_from = self._manifests.read(stage.name), self._manifests.contents(stage.sources)
        spent = self._manifests.seconds_spent(stage, found)
        manifest = self._keep_or_remove(stage, found, made_from)
        if manifest and manifest["complete"] and whole:
            logger.info("%s: already done", stage.name)
            self._relied_on.add(stage.name)
            return None
        begun = {"stage": stage.name, "inputs": stage.inputs, "made_from": made_from}
        return _Todo(begun, spent if manifest and stage.keeps_parts else 0.0, manifest is not None)

    def _begin(self, stage: Stage, todo: _Todo) -> None:
        begun = {"complete": False, "outputs": {}, "seconds": todo.seconds_before}
        self._write(stage.name, todo.begun | begun)
        if not stage.keeps_parts:
            self.discard(stage)

    def _finish(self, stage: Stage, todo: _Todo, seconds: float) -> None:
        hashes = {} if stage.keeps_parts else self._manifests.seal(stage.outputs)
        for output in stage.outputs:
            self.publish(self.path / output)
        done = {
            "complete": True,
            "outputs": hashes,
            "seconds": round(todo.seconds_before + seconds, 3),
            "resumed": todo.resumed,
            "peak_memory_bytes": peak_memory(),
            "versions": package_versions(),
        }
        self._write(stage.name, todo.begun | done)
        self._relied_on.add(stage.name)
        logger.info("%s: %.1f s", stage.name, seconds)

    def change_of(self, stage: Stage) -> str:
        """Return how a finished stage of this name differs; nothing if it does not, or is none."""
        manifest = self._manifests.read(stage.name)
        return describe_change(manifest, stage) if manifest and manifest["complete"] else ""

    def is_made_from(
        self, name: str, sources: Iterable[Stage], settings: Mapping[str, Any] | None = None
    ) -> bool:
        """Return whether a stage is there, whole, and made from these as they are now.

        And with these settings, if it has others beside them.
        """
        manifest = self._manifests.read(name)
        if manifest is None or not manifest["complete"] or self._manifests.damage(manifest):
            return False
        sources = [*sources]
        wanted = {source.name: source.fingerprint for source in sources}
        wanted = {"sources": wanted, **(settings or {})}
        as_planned = all(manifest["inputs"].get(key) == value for key, value in wanted.items())
        return as_planned and manifest["made_from"] == self._manifests.contents(sources)

    def find_fault(self, stages: Iterable[Stage]) -> str:
        """Return why a stage is not there as it is planned; nothing if all of them are."""
        for stage in stages:
            manifest = self._manifests.read(stage.name)
            if manifest is None or not manifest["complete"]:
                return f"{stage.name} is not done"
            made_from = self._manifests.contents(stage.sources)
            change = describe_change(manifest, stage) or describe_replaced(manifest, made_from)
            if change:
                return f"{stage.name} is not as it is to be: {change}"
            if damage := self._manifests.damage(manifest):
                return damage
        return ""

    def key(self, name: str) -> str:
        """Return the key that every shard of a stage carries; those of other runs have another."""
        manifest = self._manifests.read(name)
        if manifest is None:
            raise RunError(f"{self.path} has no stage {name!r}; run `gradsift select` with it")
        return digest([manifest["inputs"], manifest["made_from"]])[:16]

    def facts(self, stages: Iterable[Stage]) -> dict[str, dict[str, Any]]:
        """Return the manifests of the complete stages: `seconds`, `peak_memory_bytes` and so on."""
        return self._manifests.complete(stage.name for stage in stages)

    def inputs_of(self, name: str) -> dict[str, Any]:
        """Return what a finished stage of this name depended on.

        Raises:
            RunError: If there is none.
        """
        manifest = self._manifests.read(name)
        if manifest is None or not manifest["complete"]:
            raise RunError(f"{self.path}: {name} is not finished")
        return manifest["inputs"]

    def discard(self, stage: Stage) -> None:
        """Remove what a stage stored, if anything."""
        for output in stage.outputs:
            if (self.path / output).exists():
                self.remove(self.path / output)

    def write_config(self, config: Config, name: str = layout.CONFIG) -> None:
        """Keep a resolved configuration."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, config.to_yaml().encode())
        hashes = self._manifests.seal((name,))
        self.publish(path)
        done = {"stage": name, "inputs": {}, "made_from": {}, "complete": True}
        self._write(name, done | {"outputs": hashes})

    def damage(self, name: str) -> str:
        """Return what is wrong with what was kept under this name, nothing if nothing is."""
        manifest = self._manifests.read(name)
        return self._manifests.damage(manifest) if manifest and manifest["complete"] else ""

    def fault_of(self, name: str, inputs: Mapping[str, Any]) -> str:
        """Return why what a stage of this name wrote cannot be read; nothing if it can.

        `inputs`: some of those that it must have been made with.
        """
        manifest = self._manifests.read(name)
        if manifest is None or not manifest["complete"]:
            return f"{name} was not finished"
        if any(manifest["inputs"].get(key) != value for key, value in inputs.items()):
            return f"{name} was written by another version"
        return self._manifests.damage(manifest)

    def has_manifest(self, name: str) -> bool:
        """Return whether something was kept under this name, and its manifest can be read."""
        return self._manifests.read(name) is not None

    def _keep_or_remove(
        self, stage: Stage, manifest: Manifest | None, made_from: dict[str, str | None]
    ) -> Manifest | None:
        """Return a stage's manifest if what it stored is to be kept; else remove that."""
        if manifest:
            change = describe_change(manifest, stage)
            reason = change or describe_replaced(manifest, made_from)
            if not reason and manifest["complete"]:
                reason = self._manifests.damage(manifest)
            if not reason:
                return manifest
            log = logger.info if change else logger.warning  # a change is the user's choice
            log("%s is done again: %s", stage.name, reason)
            self._remove(stage, manifest)
        elif any((self.path / output).exists() for output in stage.outputs):
            path = self._manifests.path(stage.name)
            logger.warning("%s is gone or damaged: %s is done again", path, stage.name)
        return None

    def _remove(self, stage: Stage, manifest: Manifest) -> None:
        """Remove a stage's outputs; broken off in between, it is what it was, but incomplete."""
        self._write(stage.name, {**manifest, "complete": False})
        for output in stage.outputs:
            self.remove(self.path / output)
        self.remove(self._manifests.path(stage.name))

    def _write(self, name: str, manifest: Manifest) -> None:
        self.publish(self._manifests.write(name, manifest))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


def _at_another_process(
    path: Path, remote: RemoteFolder | None, opened_on: str, relied_on: set[str]
) -> Run:
    """Return a run folder for a worker, which has checked nothing yet."""
    run = Run(path, remote)
    run._opened_on, run._relied_on = opened_on, relied_on
    return run

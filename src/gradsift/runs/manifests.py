"""Manifests: for each stage, a file that says what its result depends on and what came out.

It holds the stage's inputs, what it was made from, the hash of every output, and its own hash.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gradsift.errors import RunError
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.hashing import HASH_THREADS, digest, hash_file, sync_and_hash
from gradsift.runs.stage import Stage

logger = logging.getLogger(__name__)

Manifest = Mapping[str, Any]
_HASH = re.compile("[0-9a-f]{16,}")  # of content, and commits of the Hub: nothing for people
_FILES_NAMED = 5
_OUTPUTS_NO_STAGE_READS = (f"/{layout.TRAINING_LOG}", layout.REJECTED_SUFFIX)
"""How the names of outputs end on which no later stage depends."""


class Manifests:
    """The manifests of a run folder, and which of its files are known to be as they were written.

    `intact`: what was checked, or written, by this process and need not be looked at again.
    """

    def __init__(self, run: Path) -> None:
        self.intact: set[Path] = set()
        self._run = run
        self._reported: set[Path] = set()  # damaged manifests, each named once

    def path(self, name: str) -> Path:
        """Return where the manifest of a stage lies."""
        return self._run / layout.manifest(name)

    def complete(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the manifests of the complete ones of some stages, by name."""
        found = {name: self.read(name) for name in names}
        return {
            name: manifest for name, manifest in found.items() if manifest and manifest["complete"]
        }

    def of_all_stages(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of all complete stages, by name; kept configurations are none."""
        folder = self._run / layout.MANIFESTS
        paths = sorted(folder.rglob("*.json"))
        names = (path.relative_to(folder).as_posix().removesuffix(".json") for path in paths)
        return {name: own for name, own in self.complete(names).items() if "seconds" in own}

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what a stage's manifest says; one that is not as it was written is none."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest.pop("sha256") == digest(manifest) and manifest["stage"] == name:
                return manifest
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            pass
        if path not in self._reported:
            logger.warning("%s is damaged, or of an earlier version: it counts as not there", path)
            self._reported.add(path)
        return None

    def write(self, name: str, manifest: Manifest) -> Path:
        """Write a stage's manifest and return where it lies.

        Raises:
            RunError: If the run folder is there no more.
        """
        if not (self._run / layout.OWNER).exists():
            raise RunError(
                f"the run folder {self._run} was removed while it was worked in; run the same "
                "command again"
            )
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**manifest, "sha256": digest(manifest)}, indent=2)
        write_atomically(path, content.encode())
        return path

    def contents(self, stages: Iterable[Stage]) -> dict[str, str | None]:
        """Return what tells the outputs of some stages from others of the same settings."""
        return {stage.name: _content_key(self.read(stage.name)) for stage in stages}

    def seal(self, outputs: Iterable[str]) -> dict[str, str]:
        """Bring outputs to the disk for good, and return the hash of each of their files."""
        paths = [path for output in outputs for path in _files_of(self._run / output)]
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            hashes = [*threads.map(sync_and_hash, paths)]
        self.intact |= {*paths}
        names = [path.relative_to(self._run).as_posix() for path in paths]
        return dict(zip(names, hashes, strict=True))

    def damaged(self, manifest: Manifest) -> list[Path]:
        """Return the outputs of a stage that are not as they were written."""
        expected = {self._run / name: wanted for name, wanted in manifest["outputs"].items()}
        unchecked = [path for path in expected if path not in self.intact]
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            found = [*threads.map(lambda p: hash_file(p) if p.is_file() else None, unchecked)]
        pairs = zip(unchecked, found, strict=True)
        damaged = [path for path, own in pairs if own != expected[path]]
        self.intact |= {*unchecked} - {*damaged}
        return damaged

    def damage(self, manifest: Manifest) -> str:
        """Return in words which outputs are not as they were written, nothing if none."""
        paths = self.damaged(manifest)
        return "; ".join(f"{path} is {'damaged' if path.is_file() else 'gone'}" for path in paths)

    def seconds_spent(self, stage: Stage, manifest: Manifest | None) -> float:
        """Return the seconds that went into what a stage stored, all its beginnings together.

        One that broke off could not write how long it had worked: from its manifest, written when
        it began, to the last file that it finished, as their times on the disk say.
        """
        if manifest is None:
            return 0.0
        spent = float(manifest.get("seconds", 0.0))
        if not manifest["complete"]:
            began = self.path(stage.name).stat().st_mtime
            files = [f for output in stage.outputs for f in (self._run / output).rglob("*.*")]
            # nothing, where it broke off again before it had finished a file
            so_far = max([0.0, *(file.stat().st_mtime - began for file in files)])
            spent += so_far / manifest.get("among", 1)
        return round(spent, 3)


def describe_change(manifest: Manifest, stage: Stage) -> str:
    """Return how a stage differs from the one that was done; nothing if it does not.

    What is kept as a hash is named, and its hash is not shown: its content changed.
    """
    old, new = dict(manifest["inputs"]), dict(stage.inputs)
    before, now = old.pop("sources", {}), new.pop("sources", {})
    changes = [*_differences(old, new)]
    if not changes:
        names = {**before, **now}
        changed = [name for name in names if before.get(name) != now.get(name)]
        changes = [f"{name} {_become(name, before, now)}" for name in changed]
    return "; ".join(changes)


def _become(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    if name not in now:
        return "is not used any more"
    return "changed" if name in before else "is new"


def differs_by(manifest: Manifest, stage: Stage, allowed: Collection[str]) -> bool:
    """Return whether a stage differs from the one that was done by some of its sources alone."""
    old, new = dict(manifest["inputs"]), dict(stage.inputs)
    before, now = old.pop("sources", {}), new.pop("sources", {})
    changed = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    return old == new and changed <= {*allowed}


def describe_replaced(manifest: Manifest, made_from: Mapping[str, str | None]) -> str:
    """Return which of the stages that it was made from are not what they were."""
    before = manifest["made_from"]
    return "; ".join(
        f"{name} was made anew and is not what it was"
        for name in made_from
        if before.get(name) != made_from[name]
    )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if path == "files":
        yield from _differences_of_files(old or {}, new or {})
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            name = _key_of_name(key)
            if name is None or name not in new:
                inner = f"{path}.{key}" if path else key
            elif old.get(name) == new[name]:
                inner = f"{path or name} {new[name]}"
            else:
                continue  # of another name, which is told, the content is another
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new and (_is_hash(old) or _is_hash(new)):
        if old is None or new is None:
            yield f"the {path} {'is new' if old is None else 'is not used any more'}"
        else:
            named = " " in path  # beside its hash stands its name, which is the same
            yield (
                f"the content of the {path} changed"
                if named
                else f"the {path} is another, or its content changed"
            )
    elif old != new and (isinstance(old, dict) or isinstance(new, dict)):
        yield f"{path} {'was not set before' if old is None else 'is not set any more'}"
    elif old != new:
        yield f"{path} was {json.dumps(old)}, is now {json.dumps(new)}"


def _differences_of_files(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """Yield how files differ that are kept as `{"1 NAME": hash}`, by their names alone."""
    before, now = ({key.partition(" ")[2]: own for key, own in f.items()} for f in (old, new))
    kept = [name for name in now if name in before]
    gone, added = [n for n in before if n not in now], [n for n in now if n not in before]
    if edited := [name for name in kept if before[name] != now[name]]:
        yield f"the content of {_listed(edited)} changed"
    if gone:
        yield f"not read any more: {_listed(gone)}"
    if added:
        yield f"new: {_listed(added)}"
    if kept != [name for name in before if name in now]:
        yield f"the order of the files was {_listed([*before])}, is now {_listed([*now])}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _FILES_NAMED
    return ", ".join(names[:_FILES_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _key_of_name(key: str) -> str | None:
    """Return the key beside it that names what a key holds the hash of; none if it holds none."""
    if key == "identity":
        return "name"
    return key.removesuffix("_hash") if key.endswith("_hash") else None


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _content_key(manifest: Manifest | None) -> str | None:
    """Return what tells the outputs of a stage from others of the same settings."""
    if manifest is None:
        return None
    outputs = {
        n: own for n, own in manifest["outputs"].items() if not n.endswith(_OUTPUTS_NO_STAGE_READS)
    }
    return digest(outputs or [manifest["inputs"], manifest["made_from"]])[:16]


def _files_of(path: Path) -> list[Path]:
    """Return the finished files of an output, itself or all under it."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [file for file in found if file.suffix != layout.PARTIAL]

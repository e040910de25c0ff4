"""Targets come and go in one run folder: each is measured once, to the same bytes always."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from conftest import Write, configure
from gradsift.config import Config
from gradsift.demo.skills import make_examples
from gradsift.errors import RunError
from gradsift.pipeline import run
from gradsift.sections import merge

Rows = list[dict[str, Any]]
METHODS = ("gist", "cosine", "influence", "less", "rds", "target-path", "bm25")
PLACES = {
    "gist": ("targets/{}", "coordinates/{}"), "cosine": ("cosine/{}",), "rds": ("base/targets",),
    "influence": ("influence/curvature/{}", "influence/pool/{}"), "less": ("less/targets/{}",),
    "target-path": ("target-path/{}",), "bm25": (),
}  # fmt: skip


@pytest.fixture
def targets(write: Write, target_rows: Rows) -> dict[str, Path]:
    others = make_examples("sorting", 4, seed=5)
    return {"t": write("t.jsonl", target_rows), "u": write("u.jsonl", others)}


@pytest.fixture
def whole(base: Path, targets: dict[str, Path], write: Write, pool_rows: Rows) -> Config:
    """The run of both targets."""
    return configure(
        base, write("pool.jsonl", pool_rows), targets, less={"checkpoints": 1, "dimension": 64},
        target_path={"steps": 2, "learning_rate": 1e-3}, influence={"samples": 12},
    )  # fmt: skip


def of(config: Config, *names: str, **sections: Any) -> Config:
    """The same run with some of the targets."""
    targets = {name: config.data.targets[name] for name in names}
    data = config.data.model_copy(update={"targets": targets})
    return Config.build(merge(config.model_copy(update={"data": data}).model_dump(), sections))


def stored(folder: Path, method: str, target: str) -> dict[str, bytes]:
    """What a folder holds of a target: what was measured for a method, and the picks."""
    found = {}
    for place in (*PLACES[method], "selected/{}.jsonl", "selected/{}.parquet"):
        path = folder / place.format(target)
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        found |= {str(p.relative_to(folder)): p.read_bytes() for p in files if p.is_file()}
    assert found
    return found


@pytest.mark.parametrize(
    "method", ["gist", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])]
)
def test_a_target_has_the_same_bytes_first_last_and_alone(
    whole: Config, tmp_path: Path, method: str
) -> None:
    found = []
    for number, steps in enumerate(([("t", "u")], [("t",), ("t", "u")], [("u",), ("t",)])):
        for names in steps:
            run(of(whole, *names, method=method), tmp_path / str(number))
        found.append({n: stored(tmp_path / str(number), method, n) for n in "tu"})
    assert found[0] == found[1] == found[2]


def test_a_target_more_is_measured_alone_and_one_less_is_kept(
    whole: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gradsift")
    folder = tmp_path / "run"
    run(of(whole, "t"), folder)
    times = {p: p.stat().st_mtime_ns for p in (folder / "coordinates").rglob("*.safetensors")}
    assert times
    caplog.clear()
    run(whole, folder)
    assert "coordinates/t: already done" in caplog.text
    assert "coordinates/u/epoch-1: 90 examples in" in caplog.text
    assert times == {path: path.stat().st_mtime_ns for path in times}
    picks = stored(folder, "gist", "t")
    caplog.clear()
    run(of(whole, "u"), folder)
    assert "targets not asked for now, and kept: t" in caplog.text
    assert "examples in" not in caplog.text
    assert stored(folder, "gist", "t") == picks
    assert "Not asked for this time, and kept with their picks: t." in (
        folder / "report.html"
    ).read_text(encoding="utf-8")
    caplog.clear()
    run(whole, folder)
    assert "examples in" not in caplog.text
    assert "selected/t: already done" in caplog.text


@pytest.mark.slow
def test_a_target_whose_file_changed_is_done_again_and_named(
    whole: Config, targets: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gradsift")
    folder = tmp_path / "run"
    run(whole, folder)
    kept = stored(folder, "gist", "t")
    lines = targets["u"].read_text().splitlines(keepends=True)
    targets["u"].write_text("".join(lines[:3]))
    caplog.clear()
    run(whole, folder)
    assert "data/target.u is done again: the content of" in caplog.text
    assert "targets/u is done again: data/target.u changed" in caplog.text
    assert "coordinates/u is done again: targets/u changed" in caplog.text
    assert "coordinates/t: already done" in caplog.text
    assert stored(folder, "gist", "t") == kept
    run(whole, tmp_path / "anew")
    assert stored(folder, "gist", "u") == stored(tmp_path / "anew", "gist", "u")
    with pytest.raises(RunError, match=r"'targets/t' made with other settings .*rank"):
        run(of(whole, "t", "u", gist={"rank": 2}), folder)


def test_a_shard_lost_of_one_target_is_measured_for_that_one(
    whole: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    run(whole, folder)
    shards = sorted((folder / "coordinates").rglob("*.safetensors"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    lost = [path for path in shards if path.match("u/epoch-1/0000000032.safetensors")]
    lost[0].unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO, "gradsift"):
        run(whole, folder)
    assert "coordinates/u/epoch-1: 32 examples in" in caplog.text
    assert {path: path.read_bytes() for path in shards} == {p: c for p, (c, _) in before.items()}
    assert [p for p in shards if p.stat().st_mtime_ns != before[p][1]] == lost


@pytest.mark.slow
def test_a_pass_for_two_targets_that_broke_off_goes_on(
    whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradsift.pool import worker

    class StoppedError(Exception):
        pass

    save, count = worker.save_shard, 0

    def save_three(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise StoppedError
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "save_shard", save_three)
        with pytest.raises(StoppedError):
            run(whole, tmp_path / "run")
    assert len([*(tmp_path / "run/coordinates").rglob("*.safetensors")]) == 3
    run(whole, tmp_path / "run")
    run(whole, tmp_path / "whole")
    for name in "tu":
        found = (stored(tmp_path / place, "gist", name) for place in ("run", "whole"))
        assert next(found) == next(found)

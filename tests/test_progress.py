"""Progress: from the first batches on, in lines or as a bar, and an estimate that holds still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Write, configure
from gradsift import progress
from gradsift.pipeline import run
from gradsift.progress import Tracker, batches_counted, count_batch, track

Rows = list[dict[str, Any]]


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_estimate_holds_still_after_the_first_tenth() -> None:
    rng, clock = np.random.default_rng(0), Clock()
    lengths = np.sort(rng.lognormal(5, 0.8, 1024).astype(int) + 8)[::-1]  # longest first
    groups = np.array_split(lengths, 60)
    estimates = []

    def show(tracker: Tracker) -> None:
        if tracker.tokens_seen > lengths.sum() / 10:
            estimates.append((clock.now, tracker.seconds_left))

    tracker = Tracker("pool", 1024, tokens=int(lengths.sum()), show=show, clock=clock)
    clock.now = 20  # loading the model
    for group in groups:
        # padding, a fixed cost per example, and the noise of a busy machine
        clock.now += (group.max() * len(group) * 2e-4 + len(group) * 5e-3) * rng.uniform(0.6, 1.6)
        tracker.count_batch(len(group), int(group.sum()))
    tracker.advance(1024)
    end = clock.now
    ratios = [left / (end - now) for now, left in estimates if end - now > 1 and left]
    assert len(ratios) > 40
    assert max(ratios) / min(ratios) <= 2
    assert tracker.done == 1024


def test_batches_show_before_the_shard_is_stored() -> None:
    seen: list[int] = []
    tracker = Tracker("pool", 20, tokens=200, show=lambda t: seen.append(t.done))
    tracker.count_batch(8, 80)
    tracker.count_batch(8, 80)
    tracker.advance(10)
    tracker.count_batch(8, 40)
    tracker.advance(10)
    assert seen == [8, 16, 16, 20, 20]


def test_without_a_total_there_is_no_time_left() -> None:
    clock = Clock()
    tracker = Tracker("rows", None, clock=clock)
    clock.now = 2
    tracker.advance(10)
    assert tracker.seconds_left is None
    assert tracker.rate == pytest.approx(5)


def test_only_batches_of_the_tracked_work_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gradsift")
    shown: list[int] = []
    with track("pool", 8, tokens=80) as advance:
        count_batch(4, 40)  # of a target, say, while the basis is made
        progress._listening[-1].show = lambda tracker: shown.append(tracker.done)
        with batches_counted():
            count_batch(4, 40)
        advance(8)
    count_batch(4, 40)
    assert shown == [4, 8]
    assert "pool: 8 examples in" in caplog.text


def test_batches_of_an_attempt_that_failed_do_not_count() -> None:
    with track("pool", 8, tokens=80) as advance:
        with pytest.raises(RuntimeError), batches_counted():
            count_batch(4, 40)
            raise RuntimeError("out of memory")
        with batches_counted():
            count_batch(2, 20)
        tracker = progress._listening[-1]
        assert (tracker.in_batches, tracker.tokens_seen, tracker.done) == (2, 20, 2)
        advance(8)


def test_the_first_line_comes_after_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "gradsift")
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    lines = progress._Lines()
    tracker = Tracker("pool", 100, tokens=1000, show=lines.show, clock=clock)
    for _ in range(16):
        clock.now += 3
        tracker.count_batch(2, 20)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "pool: 8 of 100 examples, 0.667/s, 2 min 18 s left",
        "pool: 28 of 100 examples, 0.667/s, 1 min 48 s left",
    ]


@pytest.mark.parametrize("method", ["gist", "rds"])
def test_a_pool_of_one_shard_is_seen_batch_by_batch(
    method: str, base: Path, adapter: Path, write: Write, pool_rows: Rows, target_rows: Rows,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[tuple[int, int | None]] = []

    class Shown:
        def show(self, tracker: Tracker) -> None:
            if tracker.tokens:
                seen.append((tracker.done, tracker.tokens_seen))

    monkeypatch.setattr(progress, "_Lines", Shown)
    config = configure(
        base, write("pool.jsonl", pool_rows), {"t": write("t.jsonl", target_rows)}, method=method,
        warmup={"adapter": str(adapter)}, engine={"window": 96, "shard_size": 96},
    )  # fmt: skip
    run(config, tmp_path / "run")
    assert len(seen) > 5
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == 90
    assert seen[0][0] < 45


def test_quiet_is_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for shown in (True, False):
        progress.set_bars(shown)
        with track("a bar", 2) as advance:
            advance(2)
        assert ("a bar" in capsys.readouterr().err) is shown
    progress.set_bars(True)

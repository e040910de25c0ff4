"""A run folder on an S3 server (moto's, on loopback) or another file system of fsspec."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import gradsift
from conftest import Write, configure
from gradsift.errors import BusyError, RunError
from gradsift.pipeline import run
from gradsift.runs import remote
from gradsift.runs.opening import locked_run
from gradsift.runs.remote import RemoteFolder

pytest.importorskip("moto", reason="moto, which plays the S3 server, is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, the copies in a folder of this test."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "copies"))
    fsspec.asyn.reset_lock()
    name = f"bucket-{os.getpid()}-{time.monotonic_ns()}"
    s3().mkdir(name)
    return f"s3://{name}"


def s3() -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


@pytest.fixture
def config(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, target_rows: Rows
) -> gradsift.Config:
    files = write("pool.jsonl", pool_rows), write("t.jsonl", target_rows)
    return configure(base, files[0], {"t": files[1]}, warmup={"adapter": str(adapter)})


def stored(url: str) -> dict[str, bytes]:
    """Return every file of a folder of the store by its name in it."""
    files = s3()
    root = url.removeprefix("s3://")
    return {path[len(root) + 1 :]: files.cat_file(path) for path in files.find(root)}


SAME = ("coordinates/", "targets/", "scores/", "data/", "selected/t")


def test_a_run_on_s3_is_the_run_on_disk(
    bucket: str, config: gradsift.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, f"{bucket}/run")
    result = run(config, tmp_path / "here")
    found = stored(f"{bucket}/run")
    here = tmp_path / "here"
    for name in (p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()):
        if name.startswith(SAME):
            assert found[name] == (here / name).read_bytes(), name
    assert {"report.html", "config.yaml", "manifests/coordinates/t.json"} <= found.keys()
    assert not [n for n in found if n.endswith(".partial") or n in (".lock", ".lock.json")]
    # another machine goes on with it: nothing is done twice
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "another"))
    again = run(config, f"{bucket}/run")
    assert again.scores().equals(result.scores())
    later = stored(f"{bucket}/run")
    assert {n: c for n, c in later.items() if n.startswith((*SAME, "manifests/"))} == {
        n: c for n, c in found.items() if n.startswith((*SAME, "manifests/"))
    }
    picked = gradsift.explain(f"{bucket}/run", result.selections["t"].picks["id"][0].as_py())
    assert "picked as number 1 of 9" in picked[0].verdict
    with pytest.raises(RunError, match=r"s3://.*/none is not a gradsift run"):
        gradsift.explain(f"{bucket}/none", "x")


@pytest.mark.slow
def test_what_another_machine_removed_or_broke_is_not_kept(
    bucket: str, config: gradsift.Config, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{bucket}/run"
    run(config, url)
    before = stored(url)
    files, root = s3(), url.removeprefix("s3://")
    first, second = (n for n in before if n.startswith("coordinates/t/adapter/00000000")), None
    first, second = next(first), "coordinates/t/adapter/0000000032.safetensors"
    files.rm(f"{root}/{first}")
    files.pipe_file(f"{root}/{second}", before[second][:-3] + b"???")
    with caplog.at_level("WARNING", "gradsift"):
        run(config, url)
    assert "0000000032.safetensors is damaged and is measured again" in caplog.text
    later = stored(url)
    assert {n: later[n] for n in before if n.startswith(SAME)} == {
        n: before[n] for n in before if n.startswith(SAME)
    }


@pytest.mark.slow
def test_a_second_machine_is_refused_until_the_first_is_dead(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/run"
    code = (
        "import sys, time; from gradsift.runs.opening import locked_run\n"
        f"with locked_run({url!r}): print('in', flush=True); time.sleep(600)"
    )
    environment = os.environ | {"GRADSIFT_CACHE": str(tmp_path / "another")}
    other = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    told = rf"{url} is in use by process {other.pid} on .*last sign"
    with pytest.raises(BusyError, match=told), locked_run(url):
        pass
    other.kill()
    other.communicate()
    with pytest.raises(BusyError, match="is in use by process"), locked_run(url):
        pass  # nobody can know yet that it is dead
    monkeypatch.setattr(remote, "LEASE_SECONDS", 0.0)
    with locked_run(url) as folder:
        monkeypatch.setattr(remote, "LEASE_SECONDS", 60.0)
        lock = json.loads(stored(url)[".lock.json"])
        assert lock["process"] == os.getpid()
        (folder.path / "log.txt").write_text("x")
    assert stored(url)["log.txt"] == b"x"
    assert ".lock.json" not in stored(url)


def test_a_process_of_this_machine_that_died_is_replaced_at_once(
    bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{bucket}/run"
    code = (
        "import os; from gradsift.runs.opening import locked_run\n"
        f"with locked_run({url!r}): os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1
    assert ".lock.json" in stored(url)
    with caplog.at_level("INFO", "gradsift"), locked_run(url):
        pass
    assert "going on in its place" in caplog.text


def test_the_owner_gives_signs_of_life(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "HEARTBEAT_SECONDS", 0.05)
    url = f"{bucket}/run"
    with locked_run(url):
        first = json.loads(stored(url)[".lock.json"])
        time.sleep(0.5)
        later = json.loads(stored(url)[".lock.json"])
    assert later["at"] > first["at"]
    assert later["token"] == first["token"]


def test_signs_of_life_go_on_after_an_error_and_end_when_it_lasts(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "HEARTBEAT_SECONDS", 0.05)
    ends: list[int] = []
    monkeypatch.setattr(remote.os, "_exit", ends.append)
    with caplog.at_level("WARNING", "gradsift"), locked_run(f"{bucket}/run"):
        first = json.loads(stored(f"{bucket}/run")[".lock.json"])
        with monkeypatch.context() as patch:
            patch.setattr(
                RemoteFolder, "_owner", lambda *_: (_ for _ in ()).throw(RunError("no net"))
            )
            time.sleep(0.3)
        assert not ends
        time.sleep(0.5)
        assert json.loads(stored(f"{bucket}/run")[".lock.json"])["at"] > first["at"] + 0.3
        assert "no sign of life could be given (no net); trying again" in caplog.text
        monkeypatch.setattr(remote, "LEASE_SECONDS", 0.1)
        with monkeypatch.context() as patch:
            patch.setattr(
                RemoteFolder, "_owner", lambda *_: (_ for _ in ()).throw(RunError("no net"))
            )
            time.sleep(0.5)
        assert set(ends) == {1}


def test_a_store_that_does_not_answer_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(RunError, match=r"cannot reach the run folder .*nosuch"),
        locked_run("nosuch://x"),
    ):
        pass
    told = r"cannot use the run folder s3://no-such-bucket/run: .*bucket"
    with pytest.raises(RunError, match=told), locked_run("s3://no-such-bucket/run"):
        pass
    with pytest.raises(RunError, match="s3://no-such-bucket/run is not a gradsift run"):
        gradsift.explain("s3://no-such-bucket/run", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    told = r"cannot use the run folder s3://.*Could not connect"
    with pytest.raises(RunError, match=told), locked_run(f"{bucket}/run"):
        pass
    fsspec.filesystem("s3").clear_instance_cache()


def files_of(folder: Path) -> list[str]:
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(p.as_posix() for p in files if p.parts[0] != ".mirror")


def test_a_folder_of_the_store_that_is_no_run_is_refused(bucket: str) -> None:
    s3().pipe_file(f"{bucket}/thesis/chapter.tex", b"x")
    with pytest.raises(RunError, match="thesis is not a gradsift run"):
        gradsift.explain(f"{bucket}/thesis", "x")
    with (
        pytest.raises(RunError, match="thesis is not empty and is not a gradsift run"),
        locked_run(f"{bucket}/thesis"),
    ):
        pass
    assert stored(f"{bucket}/thesis") == {"chapter.tex": b"x"}


def test_only_what_differs_is_transferred(tmp_path: Path) -> None:
    """On a file system without whole objects: there a file is renamed into place."""
    one, other = (
        RemoteFolder(f"local://{tmp_path}/there", tmp_path / name) for name in ("one", "other")
    )
    for name in ("a/x", "a/0000000000.safetensors", "log", "manifests/a.json"):
        (one.path / name).parent.mkdir(parents=True, exist_ok=True)
        (one.path / name).write_text(name)
    one.publish("a")
    one.publish()
    assert not [*(tmp_path / "there").rglob("*.partial")]
    other.fetch(shards=False)
    assert files_of(other.path) == ["a/x", "log", "manifests/a.json"]
    other.update()
    assert (other.path / "a" / "0000000000.safetensors").read_text() == "a/0000000000.safetensors"
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "there").rglob("*") if p.is_file()}
    (other.path / "log").write_text("longer")
    (other.path / "unknown").write_text("left behind")
    other.publish("log")
    changed = [p.name for p, t in times.items() if p.stat().st_mtime_ns != t]
    assert changed == ["log"]
    one.update()
    assert (one.path / "log").read_text() == "longer"
    one.remove("a")
    other.update()
    assert not (other.path / "a" / "x").exists()
    assert not (other.path / "unknown").exists()

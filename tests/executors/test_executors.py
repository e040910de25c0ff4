"""Several processes and machines: the same bits, and what becomes of a run when they die."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

from conftest import Write, configure
from gradsift.config import Config, EngineConfig
from gradsift.errors import ConfigError, RunError
from gradsift.executors.choice import choose_executor
from gradsift.executors.local import Local
from gradsift.executors.torchrun import launched_processes
from gradsift.pipeline import run

Rows = list[dict[str, Any]]
SHARD = 8
has_ray = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("ray"), reason="Ray is not installed"
)


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray cluster at a time: two cores hold no more."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield


@pytest.fixture
def long_config(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, target_rows: Rows
) -> Config:
    """A pool of 60 shards, which takes long enough for something to happen meanwhile."""
    rows = [row | {"id": f"{row['id']}-{n}"} for n in range(6) for row in pool_rows][: 60 * SHARD]
    files = write("pool.jsonl", rows), write("t.jsonl", target_rows)
    return configure(
        base, files[0], {"t": files[1]}, warmup={"adapter": str(adapter)},
        engine={"window": 4, "shard_size": SHARD, "batch_tokens": 60},
        policy={"duplicates": "keep"},
    )  # fmt: skip


@pytest.fixture
def whole(long_config: Config, tmp_path: Path) -> Path:
    """The folder of a run that nothing happened to, in one process."""
    with select(long_config, tmp_path / "whole") as process:
        finished(process)
    return tmp_path / "whole"


@contextmanager
def select(config: Config, folder: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the command line as a process of its own, which is gone when the block ends."""
    path = folder.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "gradsift", "select", "--config", path]
    command += ["--output-dir", folder, *arguments]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        assert process.stdout is not None
        if not process.stdout.closed:
            process.kill()
            process.communicate()


def ran(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command of this Python to its end, which is to be a good one."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], check=False, capture_output=True, text=True,
        timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def finished(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def shards(folder: Path) -> dict[str, int]:
    """Return when each shard was written."""
    found = sorted((folder / "coordinates" / "t" / "adapter").glob("*.safetensors"))
    return {path.name: path.stat().st_mtime_ns for path in found}


def wait_for(process: subprocess.Popen[str], folder: Path, count: int) -> dict[str, int]:
    while len(found := shards(folder)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return found


def actors() -> list[psutil.Process]:
    """Return the processes of the pool pass."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::MapWorker" in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def assert_same_bytes(folder: Path, whole: Path) -> None:
    for part in ("coordinates", "targets", "scores", "selected/t.jsonl"):
        paths = [whole / part] if (whole / part).is_file() else [*(whole / part).rglob("*.*")]
        assert paths
        for path in paths:
            twin = folder / path.relative_to(whole)
            assert path.read_bytes() == twin.read_bytes(), path
    assert len(shards(folder)) == len(shards(whole))
    assert not [*folder.rglob("*.partial")]


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsift.errors.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--engine ray needs ray: pip install 'gradsift\[ray\]'"):
        choose_executor(EngineConfig(executor="ray"))


@has_ray
def test_an_address_at_which_nothing_answers_is_told_at_once() -> None:
    told = r"no Ray cluster at '127.0.0.1:9': .*refused.*; start one with `ray start --head`"
    with pytest.raises(RunError, match=told):
        choose_executor(EngineConfig(executor="ray", ray_address="127.0.0.1:9"))


def test_a_launcher_alone_makes_no_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_executor(EngineConfig()) == Local()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first of two processes that a launcher began; returned is what it does with the other."""
    import torch

    done: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(f"GPU {device}"))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda kind, timeout: done.append(kind)
    )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    for name in ("broadcast_object_list", "barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name: done.append(name))
    return done


@pytest.mark.parametrize(
    ("num_gpus", "backend"), [(0, "gloo"), (1, "cpu:gloo,cuda:nccl"), (2, "cpu:gloo,cuda:nccl")]
)
def test_launched_processes_join_without_opening_a_gpu(
    launched: list[str], monkeypatch: pytest.MonkeyPatch, num_gpus: int, backend: str
) -> None:
    """What they send each other goes over gloo; whether a GPU is wanted, the settings say later."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with launched_processes() as runs_command:
        assert runs_command
    assert launched == [backend, "broadcast_object_list", "barrier", "destroy_process_group"]


@pytest.mark.parametrize("fault", [RunError("found wrong"), SystemExit(2), KeyboardInterrupt()])
def test_a_launched_process_waits_for_no_other_after_a_fault(
    launched: list[str], fault: BaseException
) -> None:
    """They may wait for it elsewhere; it is to exit, and to tell why first."""
    with pytest.raises(type(fault)), launched_processes():
        raise fault
    assert launched == ["gloo"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_in_one_process_ends_a_launch(rank: int, tmp_path: Path) -> None:
    script = tmp_path / "fault.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from gradsift.cli import app\n"
        "from gradsift.errors import RunError\n"
        "from gradsift.executors.torchrun import Torchrun\n"
        "def work():\n"
        f"    if dist.get_rank() == {rank}:\n"
        "        raise RunError('found wrong here')\n"
        "    dist.all_reduce(torch.ones(1))\n"
        "app.app = lambda: Torchrun().train(work)\n"
        "app.main()\n"
    )
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode
    assert "gradsift: found wrong here\n" in done.stderr


@pytest.mark.slow
def test_processes_train_together_again_and_again(tmp_path: Path) -> None:
    """What one training leaves keeps the next neither from joining them nor from its result."""
    script = tmp_path / "trainings.py"
    script.write_text(
        "import os, sys, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import tiny_models\n"
        "from gradsift.config import LoraConfig, WarmupConfig\n"
        "from gradsift.models.lora import attach_lora\n"
        "from gradsift.models.training import train\n"
        "rank = os.environ.get('RANK')\n"
        "if rank:\n"
        "    dist.init_process_group('gloo')\n"
        "settings = WarmupConfig(batch_size=4, learning_rate=1e-2)\n"
        "for seed in (0, 1):\n"
        "    base = tiny_models.build('llama')\n"
        "    model = attach_lora(base, LoraConfig(rank=2, dropout=0.0), seed)\n"
        "    train(model, tiny_models.examples(8), settings, steps=3, seed=seed, progress=False)\n"
        "    trained = [p.detach() for p in model.parameters() if p.requires_grad]\n"
        "    size = sum(p.double().abs().sum().item() for p in trained)\n"
        "    with open(f'{sys.argv[1]}-{rank}', 'a') as file:\n"
        "        print(size, file=file)\n"
        "if rank:\n"
        "    dist.barrier()\n"
    )
    ran(script, tmp_path / "of")
    ran("-m", "torch.distributed.run", "--nproc-per-node", "2", script, tmp_path / "of")
    alone, *two = ((tmp_path / f"of-{rank}").read_text().split() for rank in (None, 0, 1))
    assert two[0] == two[1]
    for one, other in zip(alone, two[0], strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-5)


@has_ray
@pytest.mark.slow
def test_workers_that_always_die_end_the_run(alone: None, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from gradsift.config import EngineConfig\n"
        "from gradsift.errors import RunError\n"
        "from gradsift.executors.choice import choose_executor\n"
        "def die():\n"
        "    open(path, 'a').write('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cluster = choose_executor(EngineConfig(executor='ray', workers=1))\n"
        "for path, work in [\n"
        "    (sys.argv[1], lambda: cluster.call(die)),\n"
        "    (sys.argv[2], lambda: [*cluster.map(die, ['a'])]),  # as it opens its worker\n"
        "]:\n"
        "    try:\n"
        "        work()\n"
        "    except RunError as error:\n"
        "        print('told:', error)\n"
    )
    paths = tmp_path / "call", tmp_path / "map"
    done = ran("-c", code, *paths)
    told = re.findall("told: (.*)", done.stdout)
    assert [path.read_text() for path in paths] == ["xxxx", "xxxx"]
    assert len(told) == 2
    for message in told:
        assert message.startswith("workers of the Ray cluster died 4 times at the same work; ")
        assert "/tmp/ray/session_latest/logs" in message
        assert "dmesg" in message


@has_ray
@pytest.mark.slow
def test_a_training_is_not_tried_again_after_a_fault_of_the_user(
    alone: None, tmp_path: Path
) -> None:
    """With the others waiting for the one that found it."""
    code = (
        "import sys\n"
        "from gradsift.config import EngineConfig\n"
        "from gradsift.errors import ModelError\n"
        "from gradsift.executors.choice import choose_executor\n"
        "path = sys.argv[1]\n"
        "def work():\n"
        "    import torch.distributed as dist\n"
        "    open(path, 'a').write(str(dist.get_rank()))\n"
        "    if dist.get_rank() == 1:\n"
        "        raise ModelError('found wrong: here')\n"
        "    dist.barrier()\n"
        "try:\n"
        "    choose_executor(EngineConfig(executor='ray', train_workers=2)).train(work)\n"
        "except ModelError as error:\n"
        "    print('told:', error)\n"
    )
    done = ran("-c", code, tmp_path / "begun")
    assert "told: found wrong: here\n" in done.stdout
    assert sorted((tmp_path / "begun").read_text()) == ["0", "1"]


@has_ray
@pytest.mark.slow
def test_the_law(long_config: Config, whole: Path, alone: None, tmp_path: Path) -> None:
    """60 or 1 shards, 1 or 2 workers, here or on Ray: the same scores, bit for bit."""
    folders = []
    for workers, size in [(1, 60 * SHARD), (2, SHARD)]:
        change = {"executor": "ray", "workers": workers, "shard_size": size}
        engine = long_config.engine.model_copy(update=change)
        folders.append(tmp_path / f"{workers}-{size}")
        config = long_config.model_copy(update={"engine": engine})
        folders[-1].with_suffix(".yaml").write_text(config.to_yaml())
    code = (
        "import gradsift, sys, logging; from gradsift.sections import read_yaml\n"
        "logging.basicConfig(level='INFO')\n"
        "for path in sys.argv[1:]:\n"
        "    gradsift.run(gradsift.Config.build(read_yaml(path + '.yaml')), path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], check=True, timeout=240,
        capture_output=True, text=True, env=os.environ | {"MKL_CBWR": "AUTO,STRICT"},
    )  # fmt: skip
    assert done.stderr.count("worker 1: process ") == 2
    assert done.stderr.count("worker 2: process ") == 1
    scores = [pq.read_table(f / "scores/gist.parquet") for f in [whole, *folders]]
    assert scores[1].equals(scores[0])
    assert scores[2].equals(scores[0])
    assert [len(shards(folder)) for folder in folders] == [1, 60]
    assert_same_bytes(folders[1], whole)


@has_ray
@pytest.mark.slow
def test_worker_and_driver_are_killed(
    long_config: Config, whole: Path, alone: None, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = ("--engine", "ray", "--workers", 2)
    with select(long_config, folder, *arguments) as process:
        before = wait_for(process, folder, 3)
        actors()[0].send_signal(signal.SIGKILL)
        before = wait_for(process, folder, 20) | before
        with select(long_config, folder, *arguments) as second:
            told = second.communicate(timeout=60)[0]
        assert second.returncode == 2
        assert f"{folder} is in use by process {process.pid}" in told
        assert process.poll() is None, "it was over before it was killed"
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
    assert "died" in output or "killed" in output
    deadline = time.monotonic() + 60
    while actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not actors(), "workers outlived their driver"
    assert before.items() <= shards(folder).items(), "what was finished was done again"
    before = shards(folder)
    with select(long_config, folder, *arguments) as process:
        output = finished(process)
    assert f"{len(before)} of 60 shards are there already" in output
    assert before.items() <= shards(folder).items(), "what was finished was done again"
    assert_same_bytes(folder, whole)


@has_ray
@pytest.mark.slow
def test_a_node_is_added_and_one_removed(
    long_config: Config, write: Write, alone: None, tmp_path: Path
) -> None:
    """The machine that is added takes over from the one that the pass began on."""
    from ray.cluster_utils import Cluster

    pool = Path(long_config.data.pool[0])
    # a minute of work: on a busy machine Ray takes half of one to begin an actor
    pool.write_bytes(pool.read_bytes() * 6)
    folder, count = tmp_path / "run", 360
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        first = cluster.add_node(num_cpus=1)
        arguments = ("--engine", "ray", "--ray-address", cluster.address, "--workers", 2)
        with select(long_config, folder, *arguments) as process:
            wait_for(process, folder, 2)
            cluster.add_node(num_cpus=1)
            while len(actors()) < 2:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.05)
            cluster.remove_node(first, allow_graceful=False)
            before = shards(folder)
            assert len(before) < count, "it was over before a node was lost"
            output = finished(process)
        assert "worker 2: process " in output
    finally:
        cluster.shutdown()
    assert before.items() <= shards(folder).items(), "what was finished was done again"
    with select(long_config, tmp_path / "whole") as process:
        finished(process)
    assert_same_bytes(folder, tmp_path / "whole")


@has_ray
@pytest.mark.slow
def test_what_a_worker_finds_wrong_reaches_the_user(
    long_config: Config, alone: None, adapter: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in adapter.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors", {"format": "pt"})
    warmup = long_config.warmup.model_copy(update={"adapter": str(broken)})
    config = long_config.model_copy(update={"warmup": warmup})
    with select(config, tmp_path / "run", "--engine", "ray") as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert "gradsift: the gradient of the target 't' is not finite for" in output
    changes = {"adapter": None, "learning_rate": 1e30, "epochs": 2}
    warmup = long_config.warmup.model_copy(update=changes)
    config = long_config.model_copy(update={"warmup": warmup})
    with select(config, tmp_path / "diverged", "--engine", "ray") as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert "gradsift: the grad norm of the warm-up is" in output or "the loss of the" in output
    manifest = json.loads((tmp_path / "diverged/manifests/warmup.json").read_text())
    assert not manifest["complete"]


@pytest.mark.slow
def test_a_full_disk_is_told_and_nothing_is_lost(
    long_config: Config, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=280k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: that takes root")
    try:
        with select(long_config, folder / "run") as process:
            output = process.communicate(timeout=120)[0]
        assert process.returncode == 2, output
        assert "the disk is full: cannot write " in output
        before = shards(folder / "run")
        assert not [*(folder / "run").rglob("*.partial")]
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        with select(long_config, folder / "run") as process:
            output = finished(process)
        assert before.items() <= shards(folder / "run").items()
        assert_same_bytes(folder / "run", whole)
        assert 0 < len(before) < 60
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_torchrun_shares_the_pool_pass_and_the_training(
    base: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path
) -> None:
    files = write("pool.jsonl", pool_rows), write("t.jsonl", target_rows)
    config = configure(
        base, files[0], {"t": files[1]},
        lora={"dropout": 0.0}, warmup={"batch_size": 8, "epochs": 2},
        engine={"window": 8, "shard_size": 8},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "gradsift", "select"]
    command += ["--config", tmp_path / "config.yaml", "--output-dir"]
    done = ran(*command, tmp_path / "two")
    assert done.stdout.count("t: 9 picks of 90 by gist") == 1
    run(config, tmp_path / "one")
    adapters = [
        load_file(tmp_path / name / "warmup/epoch-2/adapter_model.safetensors")
        for name in ("one", "two")
    ]
    for name, values in adapters[0].items():
        assert abs(values - adapters[1][name]).max() < 1e-5 * max(1, abs(values).max())
    # from the same adapter: the same bits
    warmup = {"warmup": {"adapter": str(tmp_path / "one/warmup/epoch-2")}}
    config = configure(
        base, files[0], {"t": files[1]}, **warmup, engine={"window": 8, "shard_size": 8}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    ran(*command, tmp_path / "shared")
    with select(config, tmp_path / "alone") as process:
        finished(process)
    one, other = (pq.read_table(tmp_path / n / "scores/gist.parquet") for n in ("alone", "shared"))
    assert one.equals(other)


@has_ray
@pytest.mark.slow
def test_training_and_evaluation_under_ray_train(
    base: Path, write: Write, pool_rows: Rows, target_rows: Rows, alone: None, tmp_path: Path
) -> None:
    files = write("pool.jsonl", pool_rows), write("t.jsonl", target_rows)
    engine = {"window": 8, "shard_size": 32}
    sections = {"lora": {"dropout": 0.0}, "warmup": {"batch_size": 8}}
    config = configure(base, files[0], {"t": files[1]}, **sections, engine=engine)
    run(config, tmp_path / "one")
    spread = {"executor": "ray", "train_workers": 2}
    config = configure(base, files[0], {"t": files[1]}, **sections, engine=engine | spread)
    with select(config, tmp_path / "two") as process:
        finished(process)
    one, other = (
        load_file(tmp_path / name / "warmup/epoch-1/adapter_model.safetensors")
        for name in ("one", "two")
    )
    for name, values in one.items():
        assert abs(values - other[name]).max() < 1e-5 * max(1, abs(values).max())
    test = write("test.jsonl", [row | {"id": f"{row['id']}-x"} for row in target_rows])
    command = ["-m", "gradsift", "evaluate", tmp_path / "two", "--test", f"t={test}"]
    command += ["--method", "gist", "--set", "fine_tuning.steps=1", "--seeds", "2"]
    command += ["--set", "random_seeds=3", "--set", "fine_tuning.batch_size=8"]
    ran(*command)
    table = pq.read_table(tmp_path / "two/evaluation/table.parquet").to_pylist()
    assert {row["method"] for row in table} == {"base", "random", "gist"}
    cells = [*(tmp_path / "two/evaluation/cells").glob("*.safetensors")]
    assert len(cells) == 6

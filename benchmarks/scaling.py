"""What docs/scaling.md says in numbers: workers, memory over the size of the pool, selection.

    python benchmarks/scaling.py workers FOLDER      # 1 and 2 Ray workers of one thread each
    python benchmarks/scaling.py memory FOLDER       # 10,000 to 1,000,000 streamed short rows
    python benchmarks/scaling.py selection FOLDER    # 10,000,000 stored rows of 64 coordinates

`workers` takes pool, target and model from beside the project, the others make up their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

import gradsift
from gradsift.config import Config
from gradsift.data.groups import SCHEMA
from gradsift.gradients.subspace import fit_subspace
from gradsift.models.checkpoints import write_checkpoints
from gradsift.pool.shards import plan_shards, save_shard
from gradsift.runs.atomic import write_atomically
from gradsift.runs.folder import Run
from gradsift.runs.opening import locked_run
from gradsift.sections import merge
from gradsift.selection.stages import RunStages

SHARED = Path(__file__).parents[2] / "shared"
SIZES = (10_000, 100_000, 1_000_000)
WORKED_ON = 4_000  # examples of the pool beside the project
ROWS, COORDINATES, QUERIES = 10_000_000, 64, 64
AT_ONCE = 1 << 19
say = Console(soft_wrap=True, highlight=False).print


def workers(folder: Path) -> None:
    """Print the examples per second of the pool pass between its first and its last shard."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (SHARED / "data" / "pool.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "pool.jsonl").write_bytes(b"".join(lines[:: len(lines) // WORKED_ON]))
    target = {"gsm8k": str(SHARED / "data" / "targets" / "gsm8k" / "val.jsonl")}
    given = {
        "model": {"name": str(SHARED / "models" / "base"), "device": "cpu"},
        "data": {"pool": str(folder / "pool.jsonl"), "targets": target},
        "lora": {"rank": 16},
        "warmup": {"learning_rate": 1e-3},
        "policy": {"decontaminate": "none"},
        "engine": {"window": 128, "shard_size": 128},
    }
    plain = folder / "adapter"
    if not (plain / "report.html").exists():
        gradsift.run(Config.build(given), plain)
    given |= {"warmup": {"adapter": str(plain / "warmup" / "epoch-1")}}
    rates = {}
    for count in (1, 2):
        spread = {"executor": "ray", "workers": count}
        config = Config.build(merge(given, {"engine": given["engine"] | spread}))
        path = folder / f"{count}.yaml"
        path.write_text(config.to_yaml())
        code = (
            f"import ray, gradsift; from gradsift.sections import read_yaml\n"
            f"ray.init('local', num_cpus={count}, include_dashboard=False)\n"
            f"gradsift.run(gradsift.Config.build(read_yaml({str(path)!r})), "
            f"{str(folder / str(count))!r})"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        shards = [*(folder / str(count) / "coordinates" / "t" / "adapter").iterdir()]
        times = sorted(shard.stat().st_mtime for shard in shards)[count:-count]  # all are at work
        rates[count] = (len(times) - 1) * 128 / (times[-1] - times[0])
        say(f"{count} workers: {rates[count]:.1f} examples/s")
    say(f"efficiency {rates[2] / rates[1] / 2:.1%}")
    one, other = (pq.read_table(folder / str(n) / "scores" / "gist.parquet") for n in (1, 2))
    say("same scores, bit for bit:", one.equals(other))


def memory(folder: Path) -> None:
    """Print the peak memory of driver and worker for pools of several sizes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny_models

    if not folder.exists():
        folder.mkdir(parents=True)
        tiny_models.save_adapter(tiny_models.save_base(folder / "base"), folder / "adapter")
        rows = [_short(number) for number in range(64)]
        (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in SIZES:
        pool = folder / f"pool-{size}.parquet"
        if not pool.exists():
            with pq.ParquetWriter(pool, pa.Table.from_pylist([_short(0)]).schema) as writer:
                for start in range(0, size, 10_000):
                    rows = [_short(number) for number in range(start, start + 10_000)]
                    writer.write_table(pa.Table.from_pylist(rows))
        command = [sys.executable, "-m", "gradsift", "select", "--model", folder / "base"]
        command += ["--pool", pool, "--target", f"t={folder / 't.jsonl'}", "--engine", "ray"]
        command += ["--adapter", folder / "adapter", "--output-dir", folder / str(size)]
        command += ["--budget", "500", "--workers", "1", "--set", "engine.shard_size=8192"]
        peaks = _watched(list(map(str, command)))
        facts = json.loads(
            (folder / str(size) / "manifests" / "coordinates" / "t.json").read_text()
        )
        say(f"{size} examples: {peaks}; pool pass {facts['seconds']} s")
        for stage in ("data/pool", "coordinates/t", "scores/gist", "selected/t"):
            path = folder / str(size) / "manifests" / f"{stage}.json"
            facts = json.loads(path.read_text())
            peak = facts["peak_memory_bytes"] / 2**20
            say(f"  driver after {stage}: {peak:.0f} MiB, {facts['seconds']} s")


def selection(folder: Path) -> None:
    """Print seconds and peak memory of scoring and picking from stored coordinates."""
    config = _stored_run(folder)
    path = folder.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "gradsift", "select", "--config", path]
    started = time.perf_counter()
    peaks = _watched(list(map(str, [*command, "--output-dir", folder])))
    say(f"in all {time.perf_counter() - started:.1f} s, peak {peaks}")
    for stage in ("scores/gist", "selected/t"):
        facts = json.loads((folder / "manifests" / f"{stage}.json").read_text())
        say(f"{stage}: {facts['seconds']} s, peak {facts['peak_memory_bytes'] / 2**30:.2f} GiB")


def _short(number: int) -> dict[str, str]:
    rng = np.random.default_rng(number)
    one, other = rng.integers(0, 1000, 2)
    return {"id": f"e{number}", "prompt": f"{one} and {other}?", "completion": f"{one + other}"}


def _watched(command: list[str]) -> dict[str, str]:
    """Run a command and return the peak resident memory of its process and of Ray's actors."""
    process = psutil.Popen(command, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    peaks = {"driver": 0, "worker": 0}
    while process.poll() is None:
        time.sleep(0.5)
        found = [("driver", process)]
        for other in psutil.process_iter(["cmdline"]):
            if "ray::MapWorker" in " ".join(other.info["cmdline"] or ()):
                found.append(("worker", other))
        for name, one in found:
            try:
                peaks[name] = max(peaks[name], one.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
    assert process.returncode == 0, command
    return {name: f"{peak / 2**20:.0f} MiB" for name, peak in peaks.items() if peak}


def _stored_run(folder: Path) -> Config:
    """Leave a run folder as it is when the pool pass has ended, of made-up numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder.with_suffix(".jsonl"), folder.with_name("t.jsonl")
    for path, count in ((source, 1), (target, QUERIES)):
        path.write_text("".join(json.dumps(_short(n)) + "\n" for n in range(count)))
    given: dict[str, Any] = {
        "model": {"name": str(SHARED / "models" / "base"), "device": "cpu"},
        "data": {"pool": str(source), "targets": {"t": str(target)}},
        "warmup": {"mode": "none"},
        "policy": {"budget": "5%", "decontaminate": "exact"},
        "engine": {"shard_size": 65536},
    }
    config = Config.build(given)
    stages, rng = RunStages.of(config), np.random.default_rng(0)
    with locked_run(folder) as run:
        for stage in [*stages.inputs.data_stages.values(), *stages.measured]:
            with run.stage(stage) as todo:
                if todo:
                    (folder / stage.outputs[0]).parent.mkdir(parents=True, exist_ok=True)
                    _MADE_UP[stage.name](folder, rng)
    return config


def _encoded(path: Path, count: int) -> None:
    path.with_suffix("").with_suffix(".rejected.jsonl").touch()
    if path.stem.startswith("target"):
        path.with_name(f"{path.stem}.rejected.jsonl").touch()
    raw = json.dumps(_short(1)).encode()
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, count, AT_ONCE):
            rows = np.arange(start, min(start + AT_ONCE, count))
            size = len(rows)
            numbers = rows.astype(np.int64)
            hashes = np.stack([numbers, numbers * 7919], axis=1)
            hashed = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(16), size, [None, pa.py_buffer(hashes.tobytes())]
            )
            tokens = pa.array(np.tile(np.arange(12, dtype=np.int32), size))
            marks = pa.array(np.tile(np.arange(12) > 6, size))
            offsets = pa.array(np.arange(0, 12 * size + 1, 12, dtype=np.int32))
            columns = {
                "id": pa.array([f"example-{row}" for row in rows]),
                "source": pa.array(np.char.add("source-", (rows % 20).astype(str))),
                "task": pa.array([""] * size),
                "file": pa.array(["pool.jsonl"] * size),
                "line": pa.array(numbers + 1),
                "schema": pa.array(["prompt-completion"] * size),
                "num_tokens": pa.array(np.full(size, 12, np.int32)),
                "num_supervised": pa.array(np.full(size, 5, np.int32)),
                "truncated": pa.array(np.zeros(size, bool)),
                "text_hash": hashed,
                "prompt_hash": hashed,
                "input_ids": pa.ListArray.from_arrays(offsets, tokens),
                "supervised": pa.ListArray.from_arrays(offsets, marks),
                "raw": pa.array([raw] * size, pa.large_binary()),
            }
            table = pa.table({n: c.cast(SCHEMA.field(n).type) for n, c in columns.items()})
            writer.write_table(table, row_group_size=1024)


def _pool(folder: Path, rng: np.random.Generator) -> None:
    _encoded(folder / "data" / "pool.parquet", ROWS)


def _target(folder: Path, rng: np.random.Generator) -> None:
    _encoded(folder / "data" / "target.t.parquet", QUERIES)


def _warmup(folder: Path, rng: np.random.Generator) -> None:
    (folder / "warmup").mkdir()
    write_checkpoints(folder / "warmup", {"fresh": 1.0})


def _subspace(folder: Path, rng: np.random.Generator) -> None:
    from gradsift.gradients.subspace import describe, save_subspace

    rows = rng.normal(size=(QUERIES, 4096))
    gram = rows @ rows.T
    found = fit_subspace(gram, COORDINATES)
    path = folder / "targets" / "t" / "fresh.safetensors"
    save_subspace(found, gram, path)
    content = json.dumps({"fresh": describe(found)}).encode()
    write_atomically(path.with_name("spectrum.json"), content)


def _coordinates(folder: Path, rng: np.random.Generator) -> None:
    directory = folder / "coordinates" / "t" / "fresh"
    directory.mkdir(parents=True)
    for shard in plan_shards(ROWS, 65536, directory, Run(folder).key("coordinates/t")):
        values = rng.normal(size=(len(shard), COORDINATES)).astype(np.float32)
        lengths = np.linalg.norm(values, axis=1)
        tensors = {"coordinates": (values / lengths[:, None]).astype(np.float16)}
        tensors |= {"length": lengths, "gradient_norm": 2 * lengths, "loss": lengths}
        save_shard(shard, tensors, {"batch_tokens": 2048})


_MADE_UP = {
    "data/pool": _pool,
    "data/target.t": _target,
    "warmup": _warmup,
    "targets/t": _subspace,
    "coordinates/t": _coordinates,
}

if __name__ == "__main__":
    {"workers": workers, "memory": memory, "selection": selection}[sys.argv[1]](Path(sys.argv[2]))

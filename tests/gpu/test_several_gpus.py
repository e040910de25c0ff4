"""On the second of several GPUs: what is asked for there is there, and the first stays empty.

On both, in a launch by torchrun: a fault in one process ends the other too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Write

pytestmark = pytest.mark.gpu
TESTS = Path(__file__).parents[1]


@pytest.fixture
def second(device: torch.device) -> str:
    """The second GPU; with GRADSIFT_GPU_TESTS_ON=cpu the CPU, as if it were one."""
    if device.type == "cpu":
        return "cpu"
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here, two are needed")
    return "cuda:1"


SCRIPT = """
import sys
from pathlib import Path
import torch
from transformers import Trainer
import gradsift
from gradsift.models.batches import device_of

device, base, pool, target, test, folder = sys.argv[1:]
trained, plain = [], Trainer.train
def watched(self, *given, **named):
    result = plain(self, *given, **named)
    trained.append(str(device_of(self.model)))
    return result
Trainer.train = watched
gradsift.select(
    model=base, pool=pool, target={"t": target}, output_dir=folder, budget="6",
    settings={
        "model": {"device": device}, "lora": {"rank": 4, "alpha": 8},
        "warmup": {"learning_rate": 0.01, "batch_size": 8, "fraction": 0.2},
        "policy": {"decontaminate": "none"},
    },
)
gradsift.evaluate(
    folder, tests={"t": test}, methods=["gist"], seeds=2, random_seeds=3,
    fine_tuning={"steps": 2, "batch_size": 4, "learning_rate": 0.01},
)
assert set(trained) == {device}, trained
# asked first: a context takes memory of which the allocator does not know
if device == "cuda:1":
    assert not torch._C._cuda_hasPrimaryContext(0), "a context was opened on the first"
    assert torch.cuda.max_memory_allocated(1) > 0 == torch.cuda.max_memory_allocated(0)
print("nothing on the first")
"""


def test_nothing_lands_on_the_first(
    second: str,
    base: Path,
    write: Write,
    tmp_path: Path,
    pool_rows: list[dict[str, Any]],
    target_rows: list[dict[str, Any]],
) -> None:
    files = (
        write("pool.jsonl", pool_rows),
        write("t.jsonl", target_rows),
        write("test.jsonl", target_rows[:3]),
    )
    given = [second, base, *files, tmp_path / "run"]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, given)],
        check=False, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "nothing on the first" in result.stdout


LAUNCHED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import tiny_models
from gradsift.config import LoraConfig, WarmupConfig
from gradsift.executors.torchrun import Torchrun, launched_processes
from gradsift.models.lora import attach_lora
from gradsift.models.training import train

def work():
    rank = torch.distributed.get_rank()
    device = "cpu" if sys.argv[2] == "cpu" else f"cuda:{rank}"
    base = tiny_models.build("llama").to(device)
    model = attach_lora(base, LoraConfig(rank=3, alpha=6, dropout=0.0), seed=1)
    train(model, tiny_models.examples(16), WarmupConfig(batch_size=16), steps=2, seed=0)
    sys.stdout.write(f"trained {rank}\\n")  # at once: the other writes too
    sys.stdout.flush()
    if rank == int(sys.argv[3]):
        raise RuntimeError(f"something broke in process {rank}")

with launched_processes() as first:
    if first:
        Torchrun().train(work)
        print("went on", flush=True)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_in_one_process_of_a_launch_ends_it(rank: int, second: str, tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    with subprocess.Popen(
        [*command, str(TESTS), second, str(rank)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as launch:  # fmt: skip
        try:
            said, told = launch.communicate(timeout=60)
        finally:
            launch.terminate()  # its processes have groups of their own; it ends them
    assert launch.returncode == 1
    assert f"trained {rank}" in said
    assert f"RuntimeError: something broke in process {rank}" in told

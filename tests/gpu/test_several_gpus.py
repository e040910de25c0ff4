"""On the second of several GPUs: what is asked for there is there, and the first stays empty."""

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
first = torch.cuda.max_memory_allocated(0) if device == "cuda:1" else 0
print("bytes on the first:", first)
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
    assert "bytes on the first: 0" in result.stdout

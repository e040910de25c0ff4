"""Every path that differs on a GPU runs whole on fake ones, and waits for them in no batch.

`cases.py` has the paths, `faults.py` what must be found, `fake_cuda.py` the GPUs that are absent.
No number is computed, and nothing is said of kernels, the allocator or speed: `make gpu` does that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import paths
from filelock import FileLock

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
OTHERS = (
    "qwen2", "mistral", "gpt2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox",
    "qwen3_moe",
)  # fmt: skip
SCENES = {
    "llama": [
        f"llama {device} {dtype} {'all' if (device, dtype) == ('cuda:1', 'bfloat16') else 'most'}"
        for device in ("cuda:0", "cuda:1")
        for dtype in ("bfloat16", "float16", "float32")
    ],
    "other families": [f"{family} cuda:0 bfloat16 some" for family in OTHERS],
}
FOUND = {
    "block on the host": r"at least two devices, cuda:1 and cpu",
    "block on another GPU": r"at least two devices, cuda:1 and cuda:0",
    "block of another dtype": r"DtypeError: bmm of torch.bfloat16 and torch.float32",
    "block of another shape": r"unflatten: Provided sizes \[16, -1\] don't multiply up",
    "value asked for": r"waits: \{'_local_scalar_dense in faults\.\S+': \d+\}",
    "branch on a value": r"waits: \{'_local_scalar_dense in faults\.\S+branch': \d+\}",
    "copy to the host": r"waits: \{'copy from cuda to cpu in faults\.",
    "constant from a list": r"waits: \{'copy from cpu to cuda in fa",
    "copy from pageable memory": r"waits: \{'copy from cpu to cuda in faults\.",
    "rows by a mask": r"waits: \{'index in faults\.",
    "lookup of a library": r"dense in transformers\.masking_utils\.find_packed_sequence_indices",
    "work that does not wait for its block": r"mm does not wait for copy_ on another stream",
    "copy that does not wait for the work before it": r"copy_ does not wait for bmm on another",
    "memory of which the allocator is not told": r"uses memory that has no record_stream",
    "stream of the current device": r"mm does not wait for copy_ on another stream",
}


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Path:
    """The compiled stand-in; kept in pytest's cache for the next time."""
    if torch.version.cuda is not None or sys.platform != "linux":
        pytest.skip("needs a PyTorch for Linux without CUDA: with it, `make gpu` tests these paths")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (g++) for a CUDA device that is not there")
    source, home = HERE / "stand_in.cpp", Path(torch.__file__).parent
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = request.config.cache.mkdir("stand_in")  # type: ignore[union-attr]
    built = folder / f"{key}.so"
    with FileLock(folder / "lock"):
        if not built.exists():
            command = [
                compiler, "-shared", "-fPIC", "-std=c++20", f"-I{home / 'include'}", str(source),
                f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}",
                "-o", str(built.with_suffix(".new")),
            ]  # fmt: skip
            subprocess.run(command, check=True)
            built.with_suffix(".new").rename(built)
    return built


def outcomes(library: Path, call: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """Return what a process prints of its cases, by name; torch comes after the stand-in there."""
    script = f"import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); {call}"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", script, str(library), *arguments],
        check=False, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("group", SCENES)
def test_every_path_runs_and_waits_in_no_batch(library: Path, group: str) -> None:
    scenes = SCENES[group]
    found = outcomes(library, "import cases; cases.main(library, sys.argv[2:])", *scenes)
    expected = []
    for scene in scenes:
        setting, _, how_many = scene.rpartition(" ")
        expected += [f"{setting}: {path}" for path in paths(how_many)]
    assert {name: case["problem"] for name, case in found.items() if case["problem"]} == {}
    assert [*found] == expected
    for name, case in found.items():  # and it did work, in the dtype that was asked for
        assert case["products"][name.split(": ")[0].split()[2]] > 0, name


def test_planted_faults_are_found(library: Path) -> None:
    found = outcomes(library, "import faults; faults.main(library)")
    assert {
        name: found[name]["problem"]
        for name, pattern in FOUND.items()
        if not re.search(pattern, found[name]["problem"])
    } == {}
    assert [*found] == [*FOUND]

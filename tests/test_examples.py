"""The examples, run as far as one machine allows."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from conftest import Write, configure

EXAMPLES = Path(__file__).parents[1] / "examples"
Rows = list[dict[str, Any]]
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
# in place of SLURM's: what is to run on some nodes runs here, one process for each
SRUN = """#!/bin/bash
count=1
trap 'kill $(jobs -p)' TERM
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && count=${1#*=}
    shift
done
for ((i = 0; i < count; i++)); do "$@" & done
wait
wait
"""
SCONTROL = '#!/bin/bash\nprintf "%s\\n" here there\n'


def test_the_cluster_file_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load((EXAMPLES / "ray-cluster.yaml").read_text())
    validate_config(fillout_defaults(config))
    assert "gradsift[ray,s3]" in config["setup_commands"][0]


@pytest.mark.slow
def test_the_slurm_script_runs(
    base: Path, adapter: Path, write: Write, pool_rows: Rows, target_rows: Rows, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    files = write("pool.jsonl", pool_rows), write("t.jsonl", target_rows)
    config = configure(base, files[0], {"t": files[1]}, warmup={"adapter": str(adapter)})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "here,there",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_PORT": "6399",
    }
    command = [EXAMPLES / "slurm.sh", "--config", tmp_path / "config.yaml"]
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        done = subprocess.run(
            list(map(str, [*command, "--output-dir", tmp_path / "run"])), check=False, timeout=240,
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray: 2 machines, 2 CPUs, 0 GPUs" in done.stderr
    assert (tmp_path / "run/selected/t.jsonl").exists()

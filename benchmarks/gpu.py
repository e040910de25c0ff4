"""Everything that wants a GPU, in order of worth, each result written down as it comes: `make gpu`.

    python benchmarks/gpu.py                      # what is not finished yet in gpu-results/
    python benchmarks/gpu.py exactness streams    # these, again
    python benchmarks/gpu.py --limit 1200 --folder results

Needs nothing but Python to begin with: it takes the project's environment if PyTorch sees CUDA
there, else its own interpreter, with `src` and the wheels in `wheels/` on the path, and says what
is missing. No network. docs/gpu.md says what each step answers and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]
SHARED = HOME.parent / "shared"
RESULTS, LOG = "results.jsonl", "log.txt"
LEAST = 20.0  # seconds that must be left for a step to begin: imports alone take ten
# what the steps import of what is not in Python; a test runs without all else
NEEDED = (
    *("accelerate", "annotated_types", "datasets", "datasketch", "dill", "filelock", "fsspec"),
    *("jaxtyping", "jinja2", "multiprocess", "numpy", "peft", "plotly", "psutil", "pyarrow"),
    *("pydantic", "pydantic_core", "pytest", "rich", "safetensors", "scipy", "threadpoolctl"),
    *("tokenizers", "torch", "transformers", "typer", "typing_inspection", "yaml"),
)
PROBE = f"""
import importlib.util, json, sys
found = {{"python": sys.version.split()[0], "executable": sys.executable, "torch": None}}
found["missing"] = [n for n in {NEEDED!r} if importlib.util.find_spec(n) is None]
if "torch" not in found["missing"]:
    import torch
    found |= {{"torch": torch.__version__, "cuda": torch.version.cuda}}
    found["gpus"] = [
        [p.name, p.total_memory, p.multi_processor_count]
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    from importlib.metadata import PackageNotFoundError, version
    for name in ("transformers", "peft", "accelerate", "numpy", "pyarrow", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Step:
    """A command, and the seconds that it may take."""

    name: str
    limit: float
    command: tuple[str, ...]


def plan_steps(scratch: Path, results: Path, on: str) -> list[Step]:
    """Return the steps, what is worth most first; on a CPU small ones, to try the script itself."""
    small = on == "cpu"
    patience = 5 if small else 1

    def tests(name: str, limit: float) -> Step:
        options = ("-v", "-rs", "-p", "no:cacheprovider", "--tb=short", "--durations=5")
        # beartype need not be there, and other versions of libraries may warn of other things
        ours = ("-o", "addopts=--strict-markers", "-o", "filterwarnings=default")
        file = f"tests/gpu/test_{name}.py"
        return Step(
            name.removesuffix("_on_gpu"), patience * limit, ("-m", "pytest", file, *options, *ours)
        )

    def pool_pass(shape: str, directions: int, limit: float) -> Step:
        name = f"pool-pass-{shape}-{directions}"
        size = ("--count", "512" if shape == "7b" else "2048", "--plain-count", "48")
        if small:
            shape, directions, size = "100m", 4, ("--count", "4", "--plain-count", "2")
        command = ("benchmarks/pool_pass.py", "--shape", shape, "--directions", str(directions))
        return Step(name, patience * limit, (*command, *size, "--results", str(results)))

    settings = ("--set", "lora.rank=16", "--set", "warmup.learning_rate=1e-3")
    claims = ("benchmarks/claims.py", str(scratch / "claims"), *settings)
    made_up = () if SHARED.exists() and not small else ("--made-up", "60" if small else "4000")
    return [
        tests("exactness", 90),
        pool_pass("7b", 64, 150),
        tests("streams", 90),
        pool_pass("1.5b", 150, 100),
        tests("out_of_memory", 60),
        tests("plan_on_gpu", 110),
        tests("runs", 90),
        tests("same_bytes", 90),
        Step("claims", patience * 120, (*claims, *made_up, "--results", str(results))),
        tests("quantized_on_gpu", 45),
        tests("several_gpus", 90),
        *(() if small else (pool_pass("1.5b", 64, 100), pool_pass("3b", 64, 100))),
    ]


def find_python(environment: dict[str, str], on: str) -> dict[str, Any]:
    """Return what the first interpreter has that can do it: the project's own, or this one.

    Exits, saying what each lacks, if none can.
    """
    refused = []
    for python in (HOME / ".venv" / "bin" / "python", Path(sys.executable)):
        if not python.exists():
            refused.append(f"{python}: is not there")
            continue
        command = [str(python), "-c", PROBE]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment, cwd=HOME
        )
        if done.returncode:
            refused.append(f"{python}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        if found["missing"]:
            refused.append(f"{python}: lacks {', '.join(found['missing'])} (docs/gpu.md: wheels)")
        elif on == "cuda" and not found["gpus"]:
            refused.append(f"{python}: PyTorch {found['torch']} sees no CUDA device")
        else:
            return found
    sys.exit("no Python here can run this:\n  " + "\n  ".join(refused))


def ask_driver() -> str:
    """Return what the driver says of the cards: name, version, power limit, clocks."""
    asked = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,mig.mode.current"
    try:
        command = ["nvidia-smi", asked, "--format=csv,noheader"]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return "no nvidia-smi"


def unpack_wheels(wheels: Path, site: Path) -> None:
    """Unpack wheels into a folder for the path, and say there which version gradsift has."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
    source = (HOME / "src" / "gradsift" / "__init__.py").read_text("utf-8")
    found = re.search(r'__version__ = "(.+)"', source)
    assert found
    facts = site / f"gradsift-{found[1]}.dist-info"  # runs record it; nothing is installed here
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: gradsift\nVersion: {found[1]}\n")


def write_down(results: Path, **entry: object) -> None:
    """Append a line to the results."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def finished(results: Path) -> dict[str, str]:
    """Return how each step ended that was not cut short."""
    lines = results.read_text("utf-8").splitlines() if results.exists() else []
    entries = [json.loads(line) for line in lines]
    ended = {entry["step"]: entry["status"] for entry in entries if "status" in entry}
    return {name: status for name, status in ended.items() if status in ("passed", "failed")}


def run_step(python: str, step: Step, limit: float, log: Path, environment: dict[str, str]) -> str:
    """Run a step, all it prints going into the log as it comes; return how it ended."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n=== {step.name}: {' '.join(step.command)}\n")
        file.flush()
        process = subprocess.Popen(
            [python, *step.command], stdout=file, stderr=subprocess.STDOUT, env=environment,
            cwd=HOME, start_new_session=True,
        )  # fmt: skip
        try:
            return "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:  # with all that it began
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_steps(
    python: str, steps: Sequence[Step], folder: Path, limit: float, environment: dict[str, str]
) -> bool:
    """Run the steps within `limit` seconds; return whether every one passed."""
    started, results, log = time.monotonic(), folder / RESULTS, folder / LOG
    all_passed = True
    for step in steps:
        begun, left = time.monotonic(), limit - (time.monotonic() - started)
        allowed, start = min(step.limit, left), log.stat().st_size if log.exists() else 0
        if left < min(LEAST, step.limit):
            status = "not begun"
        else:
            status = run_step(python, step, allowed, log, environment)
        seconds, said = round(time.monotonic() - begun, 1), []
        if status != "not begun":
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(start)
                said = [line for line in file.read().splitlines() if re.search(r"\w", line)]
        write_down(results, step=step.name, status=status, seconds=seconds, said=said[-1:])
        sys.stdout.write(f"{step.name}: {status}, {seconds:.0f} s{''.join(said[-1:]) and ': '}")
        sys.stdout.write("\n  ".join(said[-1:] if status == "passed" else said[-15:]) + "\n")
        sys.stdout.flush()
        all_passed &= status == "passed"
    return all_passed


def main() -> None:
    """Find an interpreter, write down what is here, and run what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="STEP", help="these steps, also if finished")
    parser.add_argument("--folder", type=Path, default=HOME / "gpu-results")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds in all")
    parser.add_argument("--wheels", type=Path, default=HOME / "wheels")
    parser.add_argument("--on", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args()
    started, results = time.monotonic(), given.folder.absolute() / RESULTS
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        unpack_wheels(given.wheels, site)
        path = os.pathsep.join(
            filter(None, [str(HOME / "src"), str(site), os.getenv("PYTHONPATH")])
        )
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever the machine has
            "GRADSIFT_GPU_FIGURES": str(results),
            "GRADSIFT_GPU_TESTS_ON": "cpu" if given.on == "cpu" else "cuda:0",
        }  # fmt: skip
        machine = find_python(environment, given.on)
        machine |= {"driver": ask_driver(), "wheels": [w.name for w in given.wheels.glob("*.whl")]}
        write_down(results, machine=machine)
        sys.stdout.write(f"{json.dumps(machine)}\n")
        steps = plan_steps(Path(scratch), results, given.on)
        unknown = set(given.names) - {step.name for step in steps}
        if unknown:
            parser.error(f"no step {', '.join(unknown)}; {', '.join(s.name for s in steps)}")
        done = finished(results)
        todo = [s for s in steps if (s.name in given.names if given.names else s.name not in done)]
        left = given.limit - (time.monotonic() - started)
        passed = run_steps(machine["executable"], todo, results.parent, left, environment)
    sys.exit(0 if passed and "failed" not in finished(results).values() else 1)


if __name__ == "__main__":
    main()

"""Everything that wants a GPU, in order of worth, each result written down as it comes: `make gpu`.

    python benchmarks/gpu.py                      # what has not passed yet by gpu-results/
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
PATIENCE = 120.0  # seconds for what is asked beforehand: the first imports on a cold disk
# what has to be the same for an earlier result to count
DECISIVE = ("on", "revision", "gpus")
# what the steps import of what is not in Python; a test runs without all else
NEEDED = (
    *("torch", "numpy", "pyarrow.parquet", "safetensors.torch", "tokenizers", "transformers"),
    *("accelerate", "peft", "typer", "rich.console", "filelock", "fsspec", "jinja2", "psutil"),
    *("yaml", "pydantic", "datasets", "datasketch", "plotly.graph_objects", "narwhals"),
    *("jaxtyping", "wadler_lindig", "scipy.stats", "threadpoolctl", "pytest", "gradsift.cli"),
)
# imports them one by one: a module that is there may lack what it imports itself
PROBE = """
import importlib, json, sys
from importlib.metadata import PackageNotFoundError, version
on, *names = sys.argv[1:]
found = {"python": sys.version.split()[0], "executable": sys.executable, "torch": None}
found |= {"gpus": [], "missing": []}
def attempt(name):
    try:
        return importlib.import_module(name)
    except Exception as error:
        found["missing"].append(f"{name} ({type(error).__name__}: {error})")
if "torch" in names and (torch := attempt("torch")):
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    found["gpus"] = [
        [p.name, p.total_memory, p.multi_processor_count]
        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
for name in names if on == "cpu" or found["gpus"] or not found["torch"] else ():
    if name != "torch":
        attempt(name)
for name in ("transformers", "peft", "accelerate", "numpy", "pyarrow", "bitsandbytes"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Step:
    """A command, and the seconds that it may take: twice what it is thought to."""

    name: str
    limit: float
    command: tuple[str, ...]


def plan_steps(scratch: Path, results: Path, on: str) -> list[Step]:
    """Return the steps, what is worth most first; on a CPU small ones, to try the script itself."""
    small = on == "cpu"
    patience = 3 if small else 1

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
    there = (SHARED / "models" / "base").exists() and not small
    made_up = () if there else ("--made-up", "60" if small else "4000")
    return [
        tests("exactness", 120),
        pool_pass("7b", 64, 160),
        tests("streams", 150),
        pool_pass("1.5b", 150, 120),
        tests("out_of_memory", 80),
        tests("plan_on_gpu", 140),
        tests("runs", 140),
        tests("same_bytes", 120),
        tests("quantized_on_gpu", 50),
        tests("signs", 60),
        # by now some 540 s have gone
        Step("claims", patience * 180, (*claims, *made_up, "--results", str(results))),
        tests("several_gpus", 160),
        *(() if small else (pool_pass("1.5b", 64, 120), pool_pass("3b", 64, 120))),
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
        command = [str(python), "-c", PROBE, on, *NEEDED]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, env=environment, cwd=HOME,
                timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            refused.append(f"{python}: has not imported them after {PATIENCE:.0f} s")
            continue
        if done.returncode:
            refused.append(f"{python}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        if on == "cuda" and found["torch"] and not found["gpus"]:
            refused.append(f"{python}: PyTorch {found['torch']} sees no CUDA device")
        elif found["missing"]:
            lacks = "\n    ".join(found["missing"])
            refused.append(f"{python}: lacks (docs/gpu.md: wheels)\n    {lacks}")
        else:
            return found
    sys.exit("no Python here can run this:\n  " + "\n  ".join(refused))


def ask(*command: str) -> str:
    """Return what a command says, or why it says nothing."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=PATIENCE / 4
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()


def describe_machine(environment: dict[str, str], on: str, wheels: Path) -> dict[str, Any]:
    """Return interpreter, versions, cards, what the driver says of them, and the git revision."""
    asked = "--query-gpu=name,driver_version,power.limit,clocks.max.sm,mig.mode.current"
    describe = ("git", "-C", str(HOME), "describe", "--always", "--dirty", "--abbrev=40")
    return find_python(environment, on) | {
        "on": on,
        "revision": ask(*describe, "--exclude=*") if (HOME / ".git").exists() else None,
        "driver": ask("nvidia-smi", asked, "--format=csv,noheader"),
        "wheels": sorted(wheel.name for wheel in wheels.glob("*.whl")),
    }


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


def make_environment(site: Path, results: Path, on: str) -> dict[str, str]:
    """Return the variables under which interpreters are tried and steps run."""
    path = filter(None, [str(HOME / "src"), str(site), os.getenv("PYTHONPATH")])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever the machine has
        "GRADSIFT_GPU_FIGURES": str(results),
        "GRADSIFT_GPU_TESTS_ON": "cpu" if on == "cpu" else "cuda:0",
    }  # fmt: skip


def write_down(results: Path, **entry: object) -> None:
    """Append a line to the results, after one that was cut short too."""
    whole = not results.exists() or results.read_bytes()[-1:] in (b"", b"\n")
    with results.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(entry) + "\n")


def finished(results: Path, machine: dict[str, Any]) -> set[str]:
    """Return the steps that passed with this revision on these cards."""
    passed, same = set[str](), False
    text = results.read_text("utf-8", errors="replace") if results.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut short
            continue
        if "machine" in entry:
            same = all(entry["machine"].get(name) == machine[name] for name in DECISIVE)
        elif same and "status" in entry:
            passed.discard(entry["step"])
            if entry["status"] == "passed":
                passed.add(entry["step"])
    return passed


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
    """Run the steps within `limit` seconds; return whether all that can pass here did."""
    started, results, log = time.monotonic(), folder / RESULTS, folder / LOG
    fine = True
    for step in steps:
        begun, left = time.monotonic(), limit - (time.monotonic() - started)
        start, said = log.stat().st_size if log.exists() else 0, []
        if left < step.limit / 2:  # it would be cut off
            status = "not begun"
        else:
            status = run_step(python, step, min(step.limit, left), log, environment)
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(start)
                said = [line for line in file.read().splitlines() if re.search(r"\w", line)]
        skipped = [line for line in said if line.startswith("SKIPPED")]
        if status == "passed" and skipped and not re.search(r"\d passed", said[-1]):
            status = "skipped"
        seconds, last = round(time.monotonic() - begun, 1), said[-1:]
        facts = {"skipped": skipped} if skipped else {}
        write_down(results, step=step.name, status=status, seconds=seconds, said=last, **facts)
        sys.stdout.write(f"{step.name}: {status}, {seconds:.0f} s{': ' if last else ''}")
        shown = {"passed": last, "skipped": skipped}.get(status, said[-15:])
        sys.stdout.write("\n  ".join(shown) + "\n")
        sys.stdout.flush()
        fine &= status in ("passed", "skipped")
    return fine


def end_by_exception(number: int, frame: object) -> None:
    """Leave at a signal through every `finally`: the step that runs ends too."""
    sys.exit(f"ended by {signal.Signals(number).name}")


def main() -> None:
    """Find an interpreter, write down what is here, and run what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="STEP", help="these steps, also if finished")
    parser.add_argument("--folder", type=Path, default=HOME / "gpu-results")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds in all")
    parser.add_argument("--wheels", type=Path, default=HOME / "wheels")
    parser.add_argument("--on", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_by_exception)
    started, results = time.monotonic(), given.folder.absolute() / RESULTS
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        steps = plan_steps(Path(scratch), results, given.on)
        if unknown := set(given.names) - {step.name for step in steps}:
            parser.error(f"no step {', '.join(unknown)}; {', '.join(s.name for s in steps)}")
        site = Path(scratch) / "site"
        unpack_wheels(given.wheels, site)
        environment = make_environment(site, results, given.on)
        machine = describe_machine(environment, given.on, given.wheels)
        done = finished(results, machine)
        write_down(results, machine=machine)
        sys.stdout.write(f"{json.dumps(machine)}\n")
        todo = [s for s in steps if (s.name in given.names if given.names else s.name not in done)]
        left = given.limit - (time.monotonic() - started)
        fine = run_steps(machine["executable"], todo, results.parent, left, environment)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()

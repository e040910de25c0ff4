"""The stages of `gradsift select` end to end, and what `gradsift plan` had said of them.

    python benchmarks/stages.py runs/stages --set lora.rank=16 --set warmup.learning_rate=1e-3

Pool, four targets and model are those beside the project unless arguments say otherwise; all
arguments but the folder are passed on. The folder must be new.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import gradsift
from gradsift.config import Config
from gradsift.sections import merge, parse_assignment

SHARED = Path(__file__).parents[2] / "shared"
TARGETS = ("gsm8k", "sql", "emotion", "bbh")


def main(folder: Path, assignments: list[str]) -> None:
    """Forecast, run, and print both."""
    if folder.exists():
        sys.exit(f"{folder} is there already; give a new folder")
    targets = {name: str(SHARED / "data" / "targets" / name / "val.jsonl") for name in TARGETS}
    given = {
        "model": {"name": str(SHARED / "models" / "base")},
        "data": {"pool": str(SHARED / "data" / "pool.jsonl"), "targets": targets},
    }
    config = Config.build(merge(given, *map(parse_assignment, assignments)))
    folder.mkdir(parents=True)
    settings = folder.with_name(f"{folder.name}.yaml")
    settings.write_text(config.to_yaml())
    arguments = ["--config", str(settings), "--output-dir", str(folder)]
    for verb in ("plan", "select"):  # each in a process of its own, as a user has it
        subprocess.run([sys.executable, "-m", "gradsift", verb, *arguments], check=True)
    result = gradsift.run(config, folder)  # reads what is there
    table = Table("stage", "seconds")
    for stage, seconds in result.seconds.items():
        table.add_row(stage, f"{seconds:.1f}")
    table.add_row("in all", f"{sum(result.seconds.values()):.1f}")
    console = Console()
    console.print(table)
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    console.print(f"peak memory {result.peak_memory / 2**30:.2f} GiB, disk {disk / 2**30:.3f} GiB")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [text for text in sys.argv[2:] if text != "--set"])

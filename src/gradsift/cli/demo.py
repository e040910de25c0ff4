"""`gradsift demo`: a selection among made-up skills, whose right answer is known."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from gradsift.cli.output import log_to, show
from gradsift.runs import layout

DemoFolder = Annotated[Path, typer.Option(help="where the run goes")]


def demo(output_dir: DemoFolder = Path("runs/demo")) -> None:
    """Show on made-up skills that the picks are the right ones and help: no network, 5 minutes."""
    from gradsift.demo.run_demo import run_demo

    with log_to(None):
        found = run_demo(output_dir)
    run, config = (shlex.quote(str(p)) for p in (found.run, found.run / layout.CONFIG))
    lines = [
        found.text(),
        "",
        "Where to look next:",
        f"  {found.run / layout.REPORT} in a browser: where the picks come from, and why each",
        f"  gradsift explain {run} {shlex.quote(found.first_pick)}",
        f"  gradsift select --config {config} --output-dir {run} --budget 10% --name wide",
        f"  gradsift picks {run}",
    ]
    text = "\n".join(lines)
    show(found, lambda console: console.print(text, markup=False, highlight=False, soft_wrap=True))

"""`gradsift demo`: a selection among made-up skills, whose right answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradsift.cli.output import log_to

DemoFolder = Annotated[Path, typer.Option(help="where the run goes")]


def demo(output_dir: DemoFolder = Path("runs/demo")) -> None:
    """Show on made-up skills that the picks are the right ones and help: no network, 5 minutes."""
    from gradsift.demo.run_demo import run_demo

    with log_to(None):
        table = run_demo(output_dir)
    typer.echo(table)

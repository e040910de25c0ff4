"""`gradsift geometry`: measure the paper's claims about the target loss on a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gradsift.cli.options import Engine, RayAddress, RunFolder, drop_unset, engine_settings
from gradsift.cli.output import log_to, make_console, print_path
from gradsift.runs import layout

NumExamples = Annotated[
    int | None, typer.Option(help="of each target, for the Hessian (default: 32)")
]
NumEigenvectors = Annotated[
    int | None, typer.Option(help="leading ones of the Hessian (default: 10)")
]
NumProbes = Annotated[int | None, typer.Option(help="random vectors per LoRA matrix (default: 4)")]


def geometry(
    run: RunFolder,
    examples: NumExamples = None,
    eigenvectors: NumEigenvectors = None,
    probes: NumProbes = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
) -> None:
    """Measure the paper's claims here: spectrum, curvature, and what a diagonal cannot hold."""
    flags = {"examples": examples, "eigenvectors": eigenvectors, "probes": probes}
    with log_to(run):
        from gradsift.geometry.measure import measure_geometry

        where = engine_settings(engine, ray_address)
        targets = measure_geometry(run, engine=where, **drop_unset(flags))
    _show_geometry(targets, run)


def _show_geometry(targets: Mapping[str, Any], run: str) -> None:
    """Print the three numbers of each target that the figures are about."""
    from rich.table import Table

    console = make_console()
    heads = ("target", "directions for 95 %", "eigenvectors inside", "off the diagonal")
    table = Table(*heads, title="geometry of the target loss")
    for name, target in targets.items():
        last = [*target["places"].values()][-1]
        spectrum, captured = last["spectrum"], last["hessian"]["captured"]
        directions = f"{last['hessian']['rank']} directions hold"
        inside = f"{directions} {sum(captured) / len(captured):.1%} of {len(captured)}"
        share = target["coupling"]["off_diagonal"]
        off_diagonal = f"{share['value']:.1%} ± {share['standard_error']:.1%}"
        table.add_row(name, str(spectrum["r95"]), inside, off_diagonal)
    console.print(table)
    for name in (layout.GEOMETRY_NUMBERS, layout.REPORT):
        print_path(console, run, name)

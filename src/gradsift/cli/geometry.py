"""`gradsift geometry`: measure the paper's claims about the target loss on a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.cli.options import Engine, RayAddress, RunFolder, drop_unset, engine_settings
from gradsift.cli.output import log_to, path_in_run, print_path, show
from gradsift.runs import layout

if TYPE_CHECKING:
    from rich.console import Console

NumExamples = Annotated[
    int | None, typer.Option(help="of each target, for the Hessian (default: 32)")
]
NumEigenvectors = Annotated[
    int | None, typer.Option(help="leading ones of the Hessian (default: 10)")
]
TargetNames = Annotated[
    list[str],
    typer.Option(metavar="NAME", help="targets to measure; repeatable (default: all of the run)"),
]
DrawSeed = Annotated[
    int | None, typer.Option(help="seed of the examples, probes and first vector of Lanczos")
]
NumProbes = Annotated[int | None, typer.Option(help="random vectors per LoRA matrix (default: 4)")]


def geometry(
    run: RunFolder,
    target: TargetNames = [],  # noqa: B006
    examples: NumExamples = None,
    eigenvectors: NumEigenvectors = None,
    probes: NumProbes = None,
    seed: DrawSeed = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
) -> None:
    """Measure the paper's claims here: spectrum, curvature, and what a diagonal cannot hold."""
    flags = {"examples": examples, "eigenvectors": eigenvectors, "probes": probes, "seed": seed}
    with log_to(run):
        from gradsift.geometry.measure import measure_geometry

        where = engine_settings(engine, ray_address)
        found = measure_geometry(run, targets=target, engine=where, **drop_unset(flags))
    summaries = {name: _summary(of_target) for name, of_target in found.items()}
    document = {"numbers": path_in_run(run, layout.GEOMETRY_NUMBERS), "targets": summaries}
    show(document, partial(_print_geometry, summaries, run))


def _summary(target: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a target that the figures are about, at the last adapter."""
    last = [*target["places"].values()][-1]
    return {
        "num_directions_95": last["spectrum"]["r95"],
        "rank": last["hessian"]["rank"],
        "captured": last["hessian"]["captured"],
        "off_diagonal": target["coupling"]["off_diagonal"],
    }


def _print_geometry(targets: Mapping[str, Any], run: str, console: Console) -> None:
    """Print a row for each target."""
    from rich.table import Table

    heads = ("target", "directions for 95 %", "eigenvectors inside", "off the diagonal")
    table = Table(*heads, title="geometry of the target loss")
    for name, target in targets.items():
        captured, share = target["captured"], target["off_diagonal"]
        directions = f"{target['rank']} directions hold"
        share_inside = sum(captured) / len(captured)
        inside = f"{directions} {share_inside:.1%} of {len(captured)} eigenvectors"
        off_diagonal = f"{share['value']:.1%} ± {share['standard_error']:.1%}"
        table.add_row(name, str(target["num_directions_95"]), inside, off_diagonal)
    console.print(table)
    for name in (layout.GEOMETRY_NUMBERS, layout.REPORT):
        print_path(console, run, name)

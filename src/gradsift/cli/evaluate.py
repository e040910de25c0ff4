"""`gradsift evaluate`: fine-tune on what each method picks, and compare with random picks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from gradsift.cli.options import (
    ConfigFile,
    Engine,
    EvaluationSettings,
    RayAddress,
    RunFolder,
    drop_unset,
    engine_settings,
    parse_targets,
)
from gradsift.cli.output import log_to, print_path, show
from gradsift.runs import layout

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gradsift.evaluation.results import Evaluation

HeldOut = Annotated[
    list[str],
    typer.Option(metavar="NAME=FILE", help="held-out examples of a target; repeatable"),
]
Methods = Annotated[
    list[str],
    typer.Option(
        metavar="NAME[:KEY=VALUE,…]",
        help="repeatable (default: all but embed); base and random always",
    ),
]
Budgets = Annotated[list[str], typer.Option(help="repeatable (default: that of the run)")]
NumSeeds = Annotated[int | None, typer.Option(help="trainings per selection (default: 3)")]
WholePool = Annotated[bool | None, typer.Option(help="also train on the whole pool")]
WarmupSeeds = Annotated[
    int | None, typer.Option(help="how often warm-up and picks are repeated (default: 1)")
]
Quantiles = Annotated[
    int | None, typer.Option(help="also train on random draws from so many parts of each ranking")
]
Lds = Annotated[bool | None, typer.Option("--lds", help="also the linear datamodeling score")]
Clean = Annotated[
    bool,
    typer.Option("--clean", help="remove what earlier evaluations trained and measured"),
]
HarnessTasks = Annotated[
    str | None, typer.Option(metavar="TASK,…", help="tasks of lm-evaluation-harness")
]


def evaluate(
    run: RunFolder,
    test: HeldOut = [],  # noqa: B006
    method: Methods = [],  # noqa: B006
    budget: Budgets = [],  # noqa: B006
    seeds: NumSeeds = None,
    warmup_seeds: WarmupSeeds = None,
    full: WholePool = None,
    quantiles: Quantiles = None,
    lds: Lds = None,
    lm_eval: HarnessTasks = None,
    engine: Engine = None,
    ray_address: RayAddress = None,
    config: ConfigFile = None,
    settings: EvaluationSettings = [],  # noqa: B006
    clean: Clean = False,
) -> None:
    """Find out which method helps: the same fine-tuning on what each picks, against random."""
    from gradsift.sections import merge, parse_assignment, read_yaml

    flags = {
        "tests": parse_targets(test),
        "methods": method,
        "budgets": budget,
        "seeds": seeds,
        "full": full,
        "warmup_seeds": warmup_seeds,
        "quantiles": quantiles,
        "lds": {"measure": lds},
        "lm_eval": lm_eval and lm_eval.split(","),
    }
    in_file = read_yaml(config) if config else {}
    assigned = map(parse_assignment, settings)
    with log_to(run):
        from gradsift.evaluation.config import EvaluationConfig
        from gradsift.evaluation.evaluate import run_evaluation

        merged = merge(in_file, drop_unset(flags), *assigned, replaced=("tests",))
        where = engine_settings(engine, ray_address)
        evaluation = run_evaluation(run, EvaluationConfig.build(merged), where, clean)
    show(evaluation, partial(_print_evaluation, evaluation, run))


def _print_evaluation(evaluation: Evaluation, run: str, console: Console) -> None:
    """Print how the methods did at each target and budget, what else was asked, the verdicts."""
    from gradsift.evaluation import tables

    for place in evaluation.places:
        rows = evaluation.rows_at(*place)
        console.print(_table(tables.method_table(rows), ", ".join(place)))
        if len(costs := tables.cost_table(rows)) > 1:
            console.print(_table(costs, "what measuring took"))
    for target in dict.fromkeys(dose.target for dose in evaluation.doses):
        own = [dose for dose in evaluation.doses if dose.target == target]
        console.print(_table(tables.dose_table(own), f"{target}: loss by part of the ranking"))
    if evaluation.lds:
        title = "linear datamodeling score [95 %]"
        console.print(_table(tables.datamodeling_table(evaluation.lds), title))
    for line in evaluation.verdicts:
        console.print(line, markup=False)
    for name in (layout.EVALUATION_REPORT, layout.evaluation_table("table"), layout.REPORT):
        print_path(console, run, name)


def _table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """Return a table of texts for the terminal, its heads the first row."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for head in rows[0]:
        table.add_column(Text(head), overflow="fold")  # no name is cut
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table

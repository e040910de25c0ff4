"""The Typer app: its verbs in the order of `gradsift --help`, `--version`, and the exit codes."""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import Annotated

import typer

from gradsift.cli.demo import demo
from gradsift.cli.evaluate import evaluate
from gradsift.cli.explain import explain
from gradsift.cli.geometry import geometry
from gradsift.cli.plan import plan
from gradsift.cli.report import report
from gradsift.cli.select import select


class ExitCode(IntEnum):
    """What the shell gets back."""

    DONE = 0
    INTERNAL_ERROR = 1  # what Python itself returns for an exception that nobody caught
    USER_ERROR = 2  # what Typer, too, returns for flags that it cannot read


app = typer.Typer(
    help="Pick the few per cent of an instruction-tuning pool that help your task.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (select, plan, evaluate, explain, report, geometry, demo):
    app.command()(verb)


@app.callback(invoke_without_command=True)
def _print_version(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from gradsift import __version__

        typer.echo(__version__)
        raise typer.Exit(ExitCode.DONE)


def main() -> None:
    """Run the command line, with one line for a fault that the user can mend."""
    from gradsift.errors import GradsiftError, translate_os_errors, visible
    from gradsift.executors.environment import set_environment
    from gradsift.executors.torchrun import launched_processes

    set_environment()
    try:
        with translate_os_errors(), launched_processes() as runs_command:
            if runs_command:
                app()
    except GradsiftError as error:
        typer.secho(visible(f"gradsift: {error}"), err=True, fg="red")
        sys.exit(ExitCode.USER_ERROR)

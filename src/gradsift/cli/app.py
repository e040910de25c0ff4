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
from gradsift.cli.index import index
from gradsift.cli.output import output_options, with_output
from gradsift.cli.picks import picks
from gradsift.cli.plan import plan
from gradsift.cli.report import report
from gradsift.cli.select import select
from gradsift.cli.settings import settings


class ExitCode(IntEnum):
    """What the shell gets back."""

    DONE = 0
    INTERNAL_ERROR = 1  # what Python itself returns for an exception that nobody caught
    USER_ERROR = 2  # what Typer, too, returns for flags that it cannot read


_NEW_RUN = (
    "--model Qwen/Qwen2.5-1.5B --pool 'data/*.jsonl' --target gsm8k=gsm8k_dev.jsonl "
    "--output-dir runs/gsm8k"
)
app = typer.Typer(
    help="Pick the few per cent of an instruction-tuning pool that help your task.",
    epilog=f"Examples:\n\ngradsift demo\n\ngradsift select {_NEW_RUN}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_EXAMPLES = {
    select: (
        f"gradsift select {_NEW_RUN}",
        "gradsift select --config runs/gsm8k/config.yaml --output-dir runs/gsm8k --budget 10% "
        "--name wide",
        "gradsift select --index runs/index --target gsm8k=gsm8k_dev.jsonl --output-dir runs/quick",
    ),
    index: ("gradsift index runs/index --model Qwen/Qwen2.5-1.5B --pool 'data/*.jsonl'",),
    plan: (f"gradsift plan {_NEW_RUN}", f"gradsift plan {_NEW_RUN} --check"),
    picks: ("gradsift picks runs/gsm8k", "gradsift picks runs/gsm8k --json"),
    evaluate: (
        "gradsift evaluate runs/gsm8k --test gsm8k=gsm8k_test.jsonl --method gist --method rds "
        "--set fine_tuning.steps=200",
    ),
    explain: ("gradsift explain runs/gsm8k gsm8k_cot-17",),
    report: ("gradsift report runs/gsm8k",),
    geometry: ("gradsift geometry runs/gsm8k --target gsm8k --examples 32",),
    settings: ("gradsift settings warmup", "gradsift settings evaluate --json"),
    demo: ("gradsift demo",),
}
for verb, examples in _EXAMPLES.items():
    app.command(epilog="\n\n".join(["Examples:", *examples]))(with_output(verb))


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
        if output_options.verbose:
            import traceback

            traceback.print_exc()
        typer.secho(visible(f"gradsift: {error}"), err=True, fg="red")
        sys.exit(ExitCode.USER_ERROR)

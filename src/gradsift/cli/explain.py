"""`gradsift explain`: why one example of the pool was picked or not."""

from __future__ import annotations

from typing import Annotated

import typer

from gradsift.cli.options import RunFolder
from gradsift.cli.output import log_to, show

ExampleId = Annotated[str, typer.Argument(metavar="ID", help="id of a pool example")]


def explain(run: RunFolder, example: ExampleId) -> None:
    """Say how one pool example fared: scores, ranks, what it is like, why it was picked or not."""
    from gradsift.errors import visible
    from gradsift.selection.explanation import explain as explain_example

    with log_to(None):
        explanations = explain_example(run, example)
    text = visible("\n".join(explanation.text() for explanation in explanations))
    show(explanations, lambda console: console.print(text, markup=False, highlight=False))

"""`gradsift report`: write the page of a finished run anew."""

from __future__ import annotations

from gradsift.cli.options import RunFolder
from gradsift.cli.output import log_to, path_in_run, print_path, show


def report(run: RunFolder) -> None:
    """Write report.html anew: the page that explains a selection; it needs no network."""
    with log_to(run):
        from gradsift.report.write import write_report

        path = write_report(run)
    document = {"report": path_in_run(run, path.name)}
    show(document, lambda console: print_path(console, run, path.name))

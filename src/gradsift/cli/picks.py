"""`gradsift picks`: the selections that a run folder keeps, and how much they have in common."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from gradsift.cli.options import RunFolder
from gradsift.cli.output import log_to, path_in_run, show
from gradsift.runs import layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from gradsift.selection.picks import Selection


def picks(run: RunFolder) -> None:
    """List the selections of a run: policy, picks, tokens, and their overlap with each other."""
    with log_to(None):
        from gradsift.selection.picks import list_selections, overlap

        selections = list_selections(run)
    document = [
        {
            "target": one.target,
            "name": one.policy.name,
            "method": one.method,
            "policy": one.policy.model_dump(exclude={"name"}),
            "num_picks": len(one.picks),
            "num_tokens": one.num_tokens,
            "overlap": {
                other.policy.name or "": overlap(one, other)
                for other in selections
                if other.target == one.target and other is not one
            },
            "messages": path_in_run(run, layout.messages(one.key)),
        }
        for one in selections
    ]
    show({"run": run, "selections": document}, partial(_print_selections, selections))


def _print_selections(selections: Sequence[Selection], console: Console) -> None:
    """Print a table for each target, a row for each of its selections."""
    from rich.markup import escape
    from rich.table import Table

    from gradsift.selection.picks import overlap
    from gradsift.selection.policies import shorten_policy

    for target, group in groupby(selections, key=lambda selection: selection.target):
        own = [*group]
        names = [selection.name for selection in own]
        shared = [f"like {name}" for name in names] if len(own) > 1 else []
        table = Table("selection", "method", "policy", "picks", "tokens", *shared, title=target)
        for name, one in zip(names, own, strict=True):
            cells = [
                name,
                one.method,
                escape(shorten_policy(one.policy)),
                f"{len(one.picks):,}",
                f"{one.num_tokens:,}",
            ]
            if shared:
                cells += ["" if other is one else f"{overlap(one, other):.2f}" for other in own]
            table.add_row(*cells)
        console.print(table)
    if len(selections) > len({one.target for one in selections}):
        console.print("like: the share of the picks of either that both have (Jaccard similarity)")

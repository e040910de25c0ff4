"""Why one pool example was picked, refused or left out, for every target of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError

from gradsift.data.conversations import as_text
from gradsift.errors import DataError, RunError, translate_os_errors
from gradsift.methods.job import Job, open_job
from gradsift.methods.pool_index import expected_error
from gradsift.runs import layout
from gradsift.runs.folder import Run
from gradsift.runs.opening import local_folder, read_config
from gradsift.scores.ranking import Scores
from gradsift.selection.picks import Selection, read_selections
from gradsift.selection.score_table import read_table, scores_of
from gradsift.selection.stages import RunStages

_SHOWN = 3  # target examples most like it
_CHARACTERS = 400  # of each turn


@dataclass(frozen=True)
class Neighbour:
    """A target example and its alignment with the pool example."""

    id: str
    alignment: float
    text: str


@dataclass(frozen=True)
class Explanation:
    """How one pool example fared for one target; `position` counts from 1, the best.

    `projected_share`, `loss` and `nearest` are there where the method knows them. `expected_error`:
    of the cosine of two gradients, where scores were read out of an index.

    Examples:
        >>> found = gradsift.explain("runs/gsm8k", "gsm8k_cot-17")[0]        # doctest: +SKIP
        >>> found.target, found.position <= found.num_pool                   # doctest: +SKIP
        ('gsm8k', True)
    """

    target: str
    method: str
    id: str
    row: int
    source: str
    verdict: str
    score: float
    position: int
    num_pool: int
    projected_share: float | None
    loss: float | None
    num_tokens: int
    example: str
    nearest: tuple[Neighbour, ...]
    expected_error: float | None = None

    def text(self) -> str:
        """Return the explanation in plain lines."""
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        share = ""
        if self.projected_share is not None:
            part = f"{self.projected_share:.1%} of its gradient's length"
            share = f"; {part} lies in the target's subspace"
        lines = [
            f"{self.id} (row {self.row}, source {self.source}, {self.num_tokens} tokens{loss})",
            f"for {self.target}, by {self.method}: {self.verdict}",
            f"  score {self.score:.4f}, number {self.position:,} of {self.num_pool:,}{share}",
            *self._approximation(),
            "  " + self.example.replace("\n", "\n  "),
        ]
        if self.nearest:
            lines.append("  most like these target examples:")
        for near in self.nearest:
            lines.append(f"    {near.alignment:+.4f}  {near.id}")
            lines.append("      " + near.text.replace("\n", "\n      "))
        return "\n".join(lines)

    def _approximation(self) -> list[str]:
        if self.expected_error is None:
            return []
        error = f"off by about {self.expected_error:.2g}"
        inside = ", a score by that over the share in the subspace"
        return [f"  approximate, out of an index: the cosine of two gradients is {error}{inside}"]


@translate_os_errors()
def explain(run: str | Path, example_id: str) -> list[Explanation]:
    """Return one explanation per target for the pool example (or examples) of this id.

    Examples:
        >>> print(gradsift.explain("runs/gsm8k", "gsm8k_cot-17")[0].text())  # doctest: +SKIP
        gsm8k_cot-17 (row ..., source gsm8k_cot, ... tokens...)
        for gsm8k, by gist: ...

    Raises:
        RunError: If the folder holds no finished run.
        DataError: If the pool has no example of this id.
    """
    config, path = read_config(run), local_folder(run, fetch=False)
    policy, folder = config.policy, Run(path)
    keys = map(policy.selection_of, config.data.targets)
    if not all((path / layout.reasons(key)).exists() for key in keys):
        raise RunError(f"{run} has not finished; run `gradsift select` with it again")
    if damage := folder.damage(layout.scoring(config.method)):
        raise RunError(f"{damage}; run `gradsift select` with {run} again: it is made anew")
    _find_example(path, config.method, run, example_id)  # before all files are looked at
    stages = RunStages.of(config)
    if fault := folder.find_fault(stages):
        raise RunError(f"{run} has not finished; run `gradsift select` with it again ({fault})")
    try:
        return _explain_all(open_job(stages.inputs, folder), run, example_id)
    except (OSError, pa.ArrowException, SafetensorError, LookupError) as error:
        raise RunError(
            f"{run} changed while it was read, perhaps by another `gradsift select`: {error}"
        ) from error


def _explain_all(job: Job, run: str | Path, example_id: str) -> list[Explanation]:
    method = job.config.method
    rows = _find_example(job.folder.path, method, run, example_id)
    table, scored = read_table(job.folder.path, method), scores_of(job)
    kept = read_selections(job.folder)
    return [
        _explain(job, table, int(row), name, scored[name], kept) for row in rows for name in scored
    ]


def _find_example(path: Path, method: str, run: str | Path, example_id: str) -> np.ndarray:
    """Return the rows of an id in the pool.

    Raises:
        DataError: If there is none.
        RunError: If the ids cannot be read.
    """
    try:
        ids = read_table(path, method, ["id"])["id"]
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{run} has not finished; run `gradsift select` with it again") from error
    rows = np.flatnonzero(pc.equal(ids, example_id))  # type: ignore[attr-defined]
    if not len(rows):
        raise DataError(
            f"the pool of {run} has no example {example_id!r}; ids stand in its "
            f"{layout.scores(method)}, rows that could not be used in {layout.REJECTED}"
        )
    return rows


def _explain(
    job: Job, table: pa.Table, row: int, name: str, scored: Scores, kept: Sequence[Selection]
) -> Explanation:
    scores = table[f"{name}/score"].to_numpy()
    facts = table.slice(row, 1).to_pylist()[0]
    projected, norm = facts.get(f"{name}/projected_norm"), facts.get("gradient_norm")
    by_example = scored.with_examples(np.array([row]))
    [conversation] = job.pool.conversations([row], job.config.data.columns)
    # as in the ranking: ties go to the one that comes first in the pool
    position = (scores > scores[row]).sum() + (scores[:row] == scores[row]).sum() + 1
    return Explanation(
        target=name,
        method=job.config.method,
        id=facts["id"],
        row=row,
        source=facts["source"],
        verdict=_verdict(job, name, row, kept),
        score=float(scores[row]),
        position=int(position),
        num_pool=len(scores),
        projected_share=None if projected is None else projected / norm if norm else 0.0,
        loss=facts.get("loss"),
        num_tokens=facts["num_tokens"],
        example=as_text(conversation, _CHARACTERS),
        nearest=() if by_example is None else _nearest(job, name, by_example[0]),
        expected_error=expected_error(job),
    )


def _verdict(job: Job, name: str, row: int, kept: Sequence[Selection]) -> str:
    """Return what became of a row in the selection of the run's settings, and in others."""
    own, method = job.config.policy.name, job.config.method
    found = {
        selection.policy.name: _verdict_of(selection, row)
        for selection in kept
        if selection.target == name and selection.method == method
    }
    others = [f"{other or 'unnamed'}: {found[other]}" for other in found if other != own]
    return "; ".join([found[own], *others])


def _verdict_of(selection: Selection, row: int) -> str:
    for pick in selection.picks.filter(pc.field("row") == row).to_pylist():
        place = f"picked as number {pick['rank']} of {len(selection.picks)}"
        return f"{place}, for {pick['best']}" if pick["best"] else place
    for refusal in selection.refused.filter(pc.field("row") == row).to_pylist():
        like = f" {refusal['like']}" if refusal["like"] else ""
        return f"refused: {refusal['reason']}{like}"
    return "not picked: " + (
        "it never came up" if selection.shortfall else "the budget was spent before its turn"
    )


def _nearest(job: Job, name: str, by_example: np.ndarray) -> tuple[Neighbour, ...]:
    target = job.targets[name]
    order = np.argsort(-by_example, kind="stable")[:_SHOWN]
    ids = target.take(order, ["id"])["id"].to_pylist()
    found = target.conversations(order, job.config.data.columns)
    texts = [as_text(messages, _CHARACTERS) for messages in found]
    return tuple(map(Neighbour, ids, by_example[order].tolist(), texts))

"""Why one pool example was picked, refused or left out, for every target of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from gradsift.config import Config
from gradsift.data import EncodedSet, Message
from gradsift.errors import DataError, RunError
from gradsift.methods import gist
from gradsift.pipeline import read_selection
from gradsift.shards import load_pool
from gradsift.store import read_checkpoints, read_config

_SHOWN = 3  # target examples most like it
_CHARACTERS = 400  # of each text


@dataclass(frozen=True)
class Neighbour:
    """A target example and its alignment with the pool example."""

    id: str
    alignment: float
    text: str


@dataclass(frozen=True)
class Explanation:
    """How one pool example fared for one target; `position` counts from 1, the best."""

    target: str
    id: str
    row: int
    source: str
    verdict: str
    score: float
    position: int
    num_pool: int
    projected_share: float
    loss: float
    num_tokens: int
    example: str
    nearest: tuple[Neighbour, ...]

    def text(self) -> str:
        """Return the explanation in plain lines."""
        lines = [
            f"{self.id} (row {self.row}, source {self.source}, {self.num_tokens} tokens, "
            f"loss {self.loss:.3f})",
            f"for {self.target}: {self.verdict}",
            f"  score {self.score:.4f}, number {self.position:,} of {self.num_pool:,}; "
            f"{self.projected_share:.1%} of its gradient's length lies in the target's subspace",
            "  " + self.example.replace("\n", "\n  "),
            "  most like these target examples:",
        ]
        for near in self.nearest:
            lines.append(f"    {near.alignment:+.4f}  {near.id}")
            lines.append("      " + near.text.replace("\n", "\n      "))
        return "\n".join(lines)


def explain(run: str | Path, example_id: str) -> list[Explanation]:
    """Return one explanation per target for the pool example (or examples) of this id.

    Example:
        >>> print(gradsift.explain("runs/real", "gsm8k_cot-17")[0].text())    # doctest: +SKIP

    Raises:
        RunError: If the folder holds no finished run.
        DataError: If the pool has no example of this id.
    """
    path = Path(run)
    config = read_config(path)
    if not all((path / "selected" / f"{name}.parquet").exists() for name in config.data.targets):
        raise RunError(f"{path} has not finished; run `gradsift select` with it again")
    pool = EncodedSet(path / "data" / "pool.parquet")
    matching = pool.table(["row", "id"]).filter(pc.field("id") == example_id)
    rows = matching["row"].to_pylist()
    if not rows:
        raise DataError(
            f"the pool of {path} has no example {example_id!r}; ids stand in its scores.parquet, "
            "rows that could not be used in rejected.jsonl"
        )
    return [_explain(path, config, pool, r, t) for r in rows for t in config.data.targets]


def _explain(run: Path, config: Config, pool: EncodedSet, row: int, name: str) -> Explanation:
    target = EncodedSet(run / "data" / f"target.{name}.parquet")
    checkpoints = read_checkpoints(run / "warmup")
    alignment = gist.align(config.gist, run, name, target, checkpoints)
    scores, _ = alignment.scores()
    by_example = alignment.with_examples(np.array([row]))[0]
    columns = config.data.columns
    stored = load_pool(run, checkpoints[-1], ("loss",))
    facts = pool.take([row], ["id", "source", "num_tokens"]).to_pylist()[0]
    # as in the ranking: ties go to the one that comes first in the pool
    position = (scores > scores[row]).sum() + (scores[:row] == scores[row]).sum() + 1
    return Explanation(
        target=name,
        id=facts["id"],
        row=row,
        source=facts["source"],
        verdict=_verdict(run, name, row),
        score=float(scores[row]),
        position=int(position),
        num_pool=len(pool),
        projected_share=float(alignment.views[-1].projected_share(np.array([row]))[0]),
        loss=float(stored["loss"][row]),
        num_tokens=facts["num_tokens"],
        example=_shortened(pool.conversations([row], columns)[0]),
        nearest=_nearest(target, by_example, columns),
    )


def _verdict(run: Path, name: str, row: int) -> str:
    selection = read_selection(run, name)
    for pick in selection.picks.filter(pc.field("row") == row).to_pylist():
        return f"picked as number {pick['rank']} of {len(selection.picks)}, for {pick['best']}"
    for refusal in selection.refused.filter(pc.field("row") == row).to_pylist():
        like = f" {refusal['like']}" if refusal["like"] else ""
        return f"refused: {refusal['reason']}{like}"
    return "not picked: " + (
        "it never came up" if selection.shortfall else "the budget was spent before its turn"
    )


def _nearest(
    target: EncodedSet, by_example: np.ndarray, columns: Mapping[str, str]
) -> tuple[Neighbour, ...]:
    order = np.argsort(-by_example, kind="stable")[:_SHOWN]
    ids = target.take(order, ["id"])["id"].to_pylist()
    texts = map(_shortened, target.conversations(order, columns))
    return tuple(map(Neighbour, ids, by_example[order].tolist(), texts))


def _shortened(messages: Sequence[Message]) -> str:
    turns = [f"[{m['role']}] {m['content']}" for m in messages]
    return "\n".join(t if len(t) <= _CHARACTERS else t[:_CHARACTERS] + " …" for t in turns)

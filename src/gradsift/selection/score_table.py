"""Scores of the whole pool as a table: a row per example, written once and read in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from gradsift.methods.job import Job
from gradsift.methods.registry import METHODS
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.scores.ranking import Scores


def write_scores(job: Job, facts: Mapping[str, np.ndarray], scored: Mapping[str, Scores]) -> None:
    """Write a row per pool example: what it is, what the method knows of it, its scores."""
    table = job.pool.table(["row", "id", "source", "num_tokens", "num_supervised"])
    for name, values in facts.items():
        table = table.append_column(name, pa.array(values))
    for name, target in job.targets.items():
        score, best = scored[name].scores()
        table = table.append_column(f"{name}/score", pa.array(score))
        projected = scored[name].projected_norms(slice(None))
        if projected is not None:
            table = table.append_column(f"{name}/projected_norm", pa.array(projected))
        if best is not None:
            ids = target.column("id").dictionary_encode()  # a number for each row, not a text
            won = pa.DictionaryArray.from_arrays(ids.indices.take(pa.array(best)), ids.dictionary)
            table = table.append_column(f"{name}/best", won)
    path = job.path(layout.scores(job.config.method))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(pq.write_table, table))


def scores_of(job: Job) -> Mapping[str, Scores]:
    """Return the scores of every target, from what the run's method measured."""
    return METHODS[job.config.method].scores(job)


def projected_shares(run: Path, method: str, target: str, rows: np.ndarray) -> pa.Array:
    """Return ‖c‖/‖g‖ of some rows, nulls where the method knows no subspace."""
    columns = ["gradient_norm", f"{target}/projected_norm"]
    if columns[1] not in pq.read_schema(run / layout.scores(method)).names:
        return pa.nulls(len(rows), pa.float32())
    norms, projected = (column.to_numpy()[rows] for column in read_table(run, method, columns))
    return pa.array(np.divide(projected, norms, where=norms > 0, out=norms * 0))


def read_scores(run: Path, method: str, target: str) -> Float[np.ndarray, " example"]:
    """Return a method's stored scores of the whole pool for a target."""
    return read_scores_in(run / layout.scores(method), target)


def read_scores_in(path: Path, target: str) -> Float[np.ndarray, " example"]:
    """Return the scores of the whole pool for a target that stand in a table of scores."""
    name = f"{target}/score"
    return pq.read_table(path, columns=[name])[name].to_numpy()


def read_table(run: Path, method: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a method's scores with what is known of every pool example, or some columns of it."""
    wanted = None if columns is None else list(columns)
    return pq.read_table(run / layout.scores(method), columns=wanted)


def describe_rows(run: Path, method: str, target: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Return `id`, `source`, `num_tokens`, `share` and `best` of some rows, as plain values.

    The last two are none where the method knows no subspace or no target example.
    """
    best, facts = f"{target}/best", ["id", "source", "num_tokens"]
    names = pq.read_schema(run / layout.scores(method)).names
    table = read_table(run, method, [*facts, best] if best in names else facts)
    shares = projected_shares(run, method, target, np.array(rows, np.int64)).to_pylist()
    return [
        {key: row[key] for key in facts} | {"share": share, "best": row.get(best)}
        for row, share in zip(table.take(rows).to_pylist(), shares, strict=True)
    ]

"""Scores of the whole pool as a table: a row per example, written once and read in columns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from gradsift.methods.job import Job
from gradsift.runs.atomic import write_atomically
from gradsift.runs.layout import scores_file
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
    path = job.path(scores_file(job.config.method))
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(pq.write_table, table))


def projected_shares(job: Job, name: str, rows: np.ndarray) -> pa.Array:
    """Return ‖c‖/‖g‖ of some rows, nulls where the method knows no subspace."""
    path = job.path(scores_file(job.config.method))
    columns = ["gradient_norm", f"{name}/projected_norm"]
    if columns[1] not in pq.read_schema(path).names:
        return pa.nulls(len(rows), pa.float32())
    norms, projected = (column.to_numpy()[rows] for column in pq.read_table(path, columns=columns))
    return pa.array(np.divide(projected, norms, where=norms > 0, out=norms * 0))


def read_scores(run: Path, method: str, target: str) -> Float[np.ndarray, " example"]:
    """Return a method's stored scores of the whole pool for a target."""
    name = f"{target}/score"
    return pq.read_table(run / scores_file(method), columns=[name])[name].to_numpy()

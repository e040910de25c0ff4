"""BM25: shared words, rare ones counting more (Robertson and Zaragoza, 2009), by bm25s.

Each target example is a query. Long queries have larger scores, so that their mean within a task
counts, and the best task.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradsift.errors import DataError
from gradsift.methods.base import Method
from gradsift.methods.job import Job
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Table


def scores(job: Job) -> dict[str, Alignment]:
    """Return the mean BM25 score over a task's examples, for the best task.

    Raises:
        DataError: If no example of the pool has a word.
    """
    import bm25s

    index = bm25s.BM25()
    words: Any = bm25s.tokenize(job.texts(job.pool), show_progress=False)
    if not any(map(len, words.ids)):
        raise DataError(
            "the pool has no word that BM25 could look for (of two letters or more, and not as "
            "common as 'the'); use another --method"
        )
    index.index(words, show_progress=False)
    result = {}
    for name, target in job.targets.items():
        queries: Any = bm25s.tokenize(job.texts(target), return_ids=False, show_progress=False)
        found = np.zeros((len(job.pool), len(queries)), np.float32)
        for column, asked in enumerate(queries):
            known = [word for word in asked if word in index.vocab_dict]
            if known:
                found[:, column] = index.get_scores(known)
        result[name] = Alignment(Table([(found, 1.0)]), job.tasks(name), "mean")
    return result


METHOD = Method(scores)

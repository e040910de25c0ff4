"""What was asked, what came out and what it took, gathered from a run as plain values."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradsift.methods.job import Job
from gradsift.methods.pool_index import expected_error
from gradsift.runs import layout
from gradsift.selection.picks import Selection, kept_targets, read_selection
from gradsift.selection.stages import RunStages


@dataclass(frozen=True)
class Overview:
    """What was asked, what came out and what it took."""

    run: str
    method: str
    model: str
    trust_remote_code: bool
    pool: Sequence[str]
    num_pool: int
    num_tokens: int
    budget: str
    targets: Sequence[tuple[str, str, int, int, int]]
    """Name, files, examples, picks, tokens of the picks."""
    expected_error: float | None
    """Of a product of two gradients of length 1, where scores were read out of an index."""
    others: Sequence[str]
    """Targets whose picks are kept in the folder and were not asked for this time."""
    stages: Sequence[tuple[str, float, int]]
    """Name, seconds, bytes."""
    versions: Mapping[str, str]
    rejected: Sequence[tuple[str, str, int, str]]
    """Set, reason, how many, and where the first is."""
    command: str
    config: str


def overview(job: Job, stages: RunStages, kept: Sequence[Selection] = ()) -> Overview:
    """Return what was asked, what came out and what it took; `kept`: all picks in the folder."""
    config, path = job.config, job.folder.path
    facts = job.folder.facts(stages)
    targets = []
    for name, target in job.targets.items():
        found = read_selection(path, config.policy.selection_of(name))
        files = ", ".join(config.data.targets[name])
        targets.append((name, files, len(target), len(found.picks), found.num_tokens))
    return Overview(
        run=str(path),
        method=config.method,
        model=config.model.name,
        trust_remote_code=config.model.trust_remote_code,
        pool=config.data.pool,
        num_pool=len(job.pool),
        num_tokens=int(job.pool.column("num_tokens").to_numpy().sum()),
        budget=config.policy.budget,
        targets=targets,
        expected_error=expected_error(job),
        others=kept_targets(job, kept),
        stages=[
            (stage.name, facts[stage.name]["seconds"], sum(_sizes(path, stage.outputs)))
            for stage in stages
            if stage.name in facts
        ],
        versions=next(reversed(facts.values()))["versions"],
        rejected=_rejected(path, job.inputs.data_stages),
        command=shlex.join(
            [
                "gradsift",
                "select",
                "--config",
                f"{path / layout.CONFIG}",
                "--output-dir",
                f"{path}-again",
                *(["--name", config.policy.name] if config.policy.name else []),
            ]
        ),
        config=config.to_yaml(),
    )


def _sizes(path: Path, outputs: Sequence[str]) -> Iterator[int]:
    for output in outputs:
        for file in [path / output, *(path / output).rglob("*")]:
            if file.is_file():
                yield file.stat().st_size


def _rejected(run: Path, sets: Iterable[str]) -> list[tuple[str, str, int, str]]:
    """Return the reasons for which rows could not be used, the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for name in sets:
        with (run / layout.rejected(name)).open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                key = (row["set"], row["reason"])
                counts[key] += 1
                first.setdefault(key, f"{row['file']}:{row['line']}")
    return [(*key, count, first[key]) for key, count in counts.most_common()]

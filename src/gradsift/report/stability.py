"""How sure a choice is: scores against their noise, and picks under other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from gradsift.choosing import choose, texts_of
from gradsift.config import PolicyConfig
from gradsift.job import Job
from gradsift.methods import gist
from gradsift.policies import Candidates
from gradsift.poolpass import project_rows
from gradsift.repeats import Repeats
from gradsift.scores import Alignment, Cosines, View
from gradsift.store import Stage, write_atomically
from gradsift.types import Checkpoint

SAMPLE_SEED = 0
_HALVES = 16
_NEAR_CUT = 400  # rows whose noise is looked at
_DENSITY = 40  # the best so many are all in the sample, of twice as many every second, and so on
FILE = "stability/sample.safetensors"


@dataclass(frozen=True)
class Noise:
    """How much a score moves when a random half of the target examples is left out.

    `width`: standard deviation over halves and rows near the cut, common shifts taken out.
    `num_within`: how many pool examples have a score within that of the cut.
    """

    width: float
    num_within: int


@dataclass(frozen=True)
class Change:
    """What other settings would have picked: Jaccard similarity with the picks.

    `sampled`: examples on which it is estimated, none where the whole pool was ranked.
    """

    settings: str
    jaccard: float
    sampled: int | None = None


def noise_at_cut(
    aligned: Alignment, scores: Float[np.ndarray, " example"], num_picks: int
) -> Noise | None:
    """Return the noise of the scores around the last pick; none for fewer than 4 target examples.

    Over target examples alone: the subspace is kept.
    """
    alive = np.flatnonzero(aligned.alive)
    if len(alive) < 4 or not num_picks:
        return None
    order = np.argsort(-scores, kind="stable")
    first, last = num_picks // 2, min(2 * num_picks, len(order))
    rows = order[np.unique(np.linspace(first, last - 1, _NEAR_CUT).astype(int))]
    rng = np.random.default_rng(SAMPLE_SEED)
    moved = []
    for _ in range(_HALVES):
        kept = np.zeros(len(aligned.alive), dtype=bool)
        kept[rng.permutation(alive)[: len(alive) // 2]] = True
        change = aligned.among(kept).best(rows)[0] - scores[rows]
        moved.append(change - change.mean())
    width = float(np.std(moved))
    cut = scores[order[num_picks - 1]]
    return Noise(width, int((np.abs(scores - cut) <= width).sum()))


def changes(
    job: Job,
    name: str,
    picks: Int[np.ndarray, " pick"],
    refused: Int[np.ndarray, " row"],
    pool: Candidates,
) -> list[Change]:
    """Return what GIST would have picked of the whole pool with other settings.

    What was refused is left out, and so are exact repeats; near ones are not looked for anew.
    """
    found, policy = [], _without_near(job.config.policy)
    for settings, aligned in gist.variants(job, name).items():
        turns = aligned.turns(policy)
        turns[refused] = -np.inf
        others = choose(job, name, turns, policy, pool).rows
        shared = len(np.intersect1d(picks, others))
        found.append(Change(settings, shared / (len(picks) + len(others) - shared)))
    return found


def sampling_stage(scores: Stage) -> Stage:
    """Return the stage that measures a sample of the pool in twice as many directions."""
    return Stage("stability", {"scores": scores.fingerprint}, (FILE,), cheap=True)


def measure_sample(job: Job, scores: Mapping[str, Float[np.ndarray, " example"]]) -> None:
    """Leave coordinates of a sample of the pool in twice the rank of every target.

    An example is in it with a probability that falls with its place in the ranking: what is
    picked or nearly is dense, the rest is thin, and weights make up for it.
    """
    chances = np.max([_chances(values) for values in scores.values()], axis=0)
    drawn = np.random.default_rng(SAMPLE_SEED).random(len(chances)) < chances
    rows = np.flatnonzero(drawn)
    tensors = {"rows": rows, "weights": 1 / chances[rows]}
    for checkpoint in _checkpoints(job):
        wider = {name: gist.load_wider(job, name, checkpoint) for name in job.targets}
        combinations = {name: subspace.combination for name, subspace in wider.items()}
        measured = project_rows(job, checkpoint, rows, combinations)
        tensors |= {f"{checkpoint.label}/{key}": values for key, values in measured.items()}
        tensors |= {
            f"{checkpoint.label}/target/{name}": np.ascontiguousarray(subspace.coordinates)
            for name, subspace in wider.items()
        }
    path = job.path(FILE)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def can_double(job: Job, name: str) -> bool:
    """Return whether the target spans more directions than are kept."""
    return job.config.gist.directions == "leading" and any(
        gist.load_wider(job, name, checkpoint).rank > gist.load_subspace(job, name, checkpoint).rank
        for checkpoint in _checkpoints(job)
    )


def doubled(
    job: Job,
    name: str,
    picks: Int[np.ndarray, " pick"],
    refused: Int[np.ndarray, " row"],
    pool: Candidates,
) -> Change:
    """Return what twice the rank would have picked, estimated on the sample."""
    tensors = load_file(job.path(FILE))
    views = [
        View(
            pool=tensors[f"{checkpoint.label}/coordinates/{name}"],
            target=tensors[f"{checkpoint.label}/target/{name}"].astype(np.float32),
            weight=checkpoint.weight,
            gradient_norms=tensors[f"{checkpoint.label}/gradient_norm"],
        )
        for checkpoint in _checkpoints(job)
    ]
    config = job.config.gist
    aligned = Alignment(Cosines(views, config.norm_power), job.tasks(name), config.aggregation)
    rows, weights = tensors["rows"], tensors["weights"]
    target = texts_of(job.targets[name], job.config.data.columns)
    repeats = Repeats(pool.texts, target, _without_near(job.config.policy), upcoming=list)
    open_to = ~np.isin(rows, refused) & [repeats.refuses(int(row)) is None for row in rows]
    order = np.argsort(-aligned.scores()[0][open_to], kind="stable")
    among = np.cumsum(weights[open_to][order]) <= len(picks)
    now = np.zeros(len(rows), dtype=bool)
    now[np.flatnonzero(open_to)[order]] = among
    before = np.isin(rows, picks)
    jaccard = weights[now & before].sum() / weights[now | before].sum()
    ranks = sorted(
        {gist.load_wider(job, name, checkpoint).rank for checkpoint in _checkpoints(job)}
    )
    told = f"twice the rank ({', '.join(map(str, ranks))})"
    return Change(told, float(jaccard), len(rows))


def _without_near(policy: PolicyConfig) -> PolicyConfig:
    """Return the policy that knows exact repeats alone: near ones take as long as picking."""
    keys = ("duplicates", "decontaminate")
    return policy.model_copy(update={k: "exact" for k in keys if getattr(policy, k) == "near"})


def _chances(scores: Float[np.ndarray, " example"]) -> Float[np.ndarray, " example"]:
    """Return how likely each example is to be in the sample: the best for sure, then ~ 1/place."""
    places = np.empty(len(scores))
    places[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return np.minimum(1, _DENSITY / places)


def _checkpoints(job: Job) -> list[Checkpoint]:
    return job.checkpoints(gist.stages(job.inputs)[0])

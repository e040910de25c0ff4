"""How sure a choice is: scores against their noise, and picks under other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from gradsift.config import PolicyConfig
from gradsift.data.duplicates import Repeats, texts_of
from gradsift.methods import gist
from gradsift.methods.job import Job
from gradsift.pool.coordinates import project_rows
from gradsift.runs.atomic import write_atomically
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View
from gradsift.selection.picks import choose
from gradsift.selection.policies import Candidates
from gradsift.types import Budget, Checkpoint

_SEED = 0


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
    aligned: Alignment, scores: Float[np.ndarray, " example"], cut: float
) -> Noise | None:
    """Return the noise of the scores around the cut; none for fewer than 4 target examples.

    Over target examples alone: the subspace is kept.
    """
    alive = np.flatnonzero(aligned.alive)
    if len(alive) < 4:
        return None
    order, above = np.argsort(-scores, kind="stable"), int((scores >= cut).sum())
    first, last = above // 2, min(2 * above, len(order))
    rows = order[np.unique(np.linspace(first, last - 1, _NEAR_CUT).astype(int))]
    rng = np.random.default_rng(_SEED)
    moved = []
    for _ in range(_HALVES):
        kept = np.zeros(len(aligned.alive), dtype=bool)
        kept[rng.permutation(alive)[: len(alive) // 2]] = True
        change = aligned.among(kept).best(rows)[0] - scores[rows]
        moved.append(change - change.mean())
    width = float(np.std(moved))
    return Noise(width, int((np.abs(scores - cut) <= width).sum()))


def changes(
    job: Job,
    name: str,
    picks: Int[np.ndarray, " pick"],
    repeated: Int[np.ndarray, " row"],
    pool: Candidates,
) -> list[Change]:
    """Return what GIST would have picked of the whole pool with other settings.

    `repeated`: what was refused as a repeat is left out, and so are exact repeats that come up now;
    near ones are not looked for anew.
    """
    found, policy = [], _without_near(job.config.policy)
    for settings, aligned in gist.variants(job, name).items():
        turns = aligned.turns(policy)
        turns[repeated] = -np.inf
        others = choose(job, name, turns, policy, pool).rows
        shared = len(np.intersect1d(picks, others))
        found.append(Change(settings, shared / (len(picks) + len(others) - shared)))
    return found


def sampling_stage(scores: Stage) -> Stage:
    """Return the stage that measures a sample of the pool in twice as many directions."""
    return Stage("stability", {}, (FILE,), (scores, *scores.sources), cheap=True)


def measure_sample(job: Job, scores: Mapping[str, Float[np.ndarray, " example"]]) -> None:
    """Leave coordinates of a sample of the pool in twice the rank of every target.

    An example is in it with a probability that falls with its place in the ranking: what is
    picked or nearly is dense, the rest is thin, and weights make up for it.
    """
    chances = np.max([_chances(values) for values in scores.values()], axis=0)
    drawn = np.random.default_rng(_SEED).random(len(chances)) < chances
    rows = np.flatnonzero(drawn)
    tensors = {"rows": rows, "weights": 1 / chances[rows]}
    for checkpoint in _checkpoints(job):
        # the leading half is stored: the basis of the rest is no larger than that of the pool pass
        further = {name: _further(job, name, checkpoint) for name in job.targets}
        measured = project_rows(job, checkpoint, rows, further)
        tensors |= {f"{checkpoint.label}/{key}": values for key, values in measured.items()}
    path = job.path(FILE)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def can_double(job: Job, name: str) -> bool:
    """Return whether more directions could have been kept, and picks be compared on a sample.

    On a sample there is only the plain top by count: no turns, no caps, no count of tokens.
    """
    policy, gist_config = job.config.policy, job.config.gist
    plain = policy.strategy == "top" and not policy.source_cap
    counted = Budget.parse(policy.budget).unit != "tok"
    return (
        plain
        and counted
        and gist_config.directions == "leading"
        and any(_further(job, name, checkpoint).shape[1] for checkpoint in _checkpoints(job))
    )


def doubled(
    job: Job,
    name: str,
    picks: Int[np.ndarray, " pick"],
    repeated: Int[np.ndarray, " row"],
    pool: Candidates,
) -> Change:
    """Return what twice the rank would have picked, estimated on the sample.

    As many are picked as the sample says were picked before, so that the same ranking gives 1.
    """
    tensors = load_file(job.path(FILE))
    rows, weights, views, ranks = tensors["rows"], tensors["weights"], [], set()
    for checkpoint in _checkpoints(job):
        stored = job.stored("coordinates", f"coordinates/{name}", checkpoint.label)[rows]
        further = tensors[f"{checkpoint.label}/coordinates/{name}"]
        wider = gist.load_wider(job, name, checkpoint)
        ranks.add(wider.rank)
        views.append(
            View(
                pool=np.concatenate([stored, further], axis=1),
                target=wider.coordinates.astype(np.float32),
                weight=checkpoint.weight,
                gradient_norms=tensors[f"{checkpoint.label}/gradient_norm"],
            )
        )
    config = job.config.gist
    aligned = Alignment(Cosines(views, config.norm_power), job.tasks(name), config.aggregation)
    target = texts_of(job.targets[name], job.config.data.columns)
    repeats = Repeats(pool.texts, target, _without_near(job.config.policy), upcoming=list)
    before, now = np.isin(rows, picks), np.zeros(len(rows), dtype=bool)
    left = weights[before].sum() * (1 + 1e-9)
    for place in np.argsort(-aligned.scores()[0], kind="stable"):
        row = int(rows[place])
        if row in repeated or repeats.refuses(row):
            continue
        if weights[place] > left:
            break
        now[place], left = True, left - weights[place]
        repeats.remember(row)
    jaccard = weights[now & before].sum() / weights[now | before].sum()
    told = f"up to twice the rank ({', '.join(map(str, sorted(ranks)))})"
    return Change(told, float(jaccard), len(rows))


def _further(job: Job, name: str, checkpoint: Checkpoint) -> Float[np.ndarray, "query direction"]:
    """Return the combinations that make the directions between the rank and twice the rank."""
    kept = gist.load_subspace(job, name, checkpoint).rank
    return np.ascontiguousarray(gist.load_wider(job, name, checkpoint).combination[:, kept:])


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

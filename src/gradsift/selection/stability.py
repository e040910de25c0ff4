"""How sure a choice is: scores against their noise, and picks under other settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from gradsift.config import PolicyConfig
from gradsift.data.duplicates import DuplicateFinder, dedup_columns
from gradsift.gradients.subspace import Subspace, fit_subspace, load_gram
from gradsift.methods import gist
from gradsift.methods.job import Inputs, Job
from gradsift.pool.coordinates import StoredCoordinates, by_target, make_projection_measure
from gradsift.pool.examples import measure_examples
from gradsift.runs import layout
from gradsift.runs.atomic import write_atomically
from gradsift.runs.stage import Stage
from gradsift.scores.alignment import Alignment
from gradsift.scores.ranking import Scores
from gradsift.scores.similarity import Rows, RowStore, View
from gradsift.selection.policies import Candidates, pick
from gradsift.selection.stages import scored_by
from gradsift.types import Budget, Checkpoint

_SEED = 0
_HALVES = 16
_NEAR_CUT = 400  # rows whose noise is looked at
_DENSITY = 40  # the best 40 are all in the sample, of the next about every second, and so on


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
    aligned: Scores, scores: Float[np.ndarray, " example"], cut: float
) -> Noise | None:
    """Return the noise of the scores around the cut.

    None for fewer than 4 target examples, or a method that does not compare with them.

    Over target examples alone: the subspace is kept.
    """
    if not isinstance(aligned, Alignment):
        return None
    comparable = np.flatnonzero(aligned.comparable)
    if len(comparable) < 4:
        return None
    order, above = np.argsort(-scores, kind="stable"), int((scores >= cut).sum())
    first, last = above // 2, min(2 * above, len(order))
    rows = order[np.unique(np.linspace(first, last - 1, _NEAR_CUT).astype(int))]
    rng = np.random.default_rng(_SEED)
    moved = []
    for _ in range(_HALVES):
        kept = np.zeros(len(aligned.comparable), dtype=bool)
        kept[rng.permutation(comparable)[: len(comparable) // 2]] = True
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
    target = dedup_columns(job.targets[name], job.config.data.columns)
    for settings, aligned in _variants(job, name).items():
        rankings = aligned.rankings(policy)
        rankings[repeated] = -np.inf
        others = pick(rankings, pool, target, policy).rows
        shared = len(np.intersect1d(picks, others))
        found.append(Change(settings, shared / (len(picks) + len(others) - shared)))
    return found


@dataclass(frozen=True)
class _Half:
    """The leading half of the directions, at least one."""

    whole: RowStore

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, rows: Rows) -> np.ndarray:
        found = self.whole[rows]
        return found[:, : max(1, found.shape[1] // 2)]


def _variants(job: Job, name: str) -> dict[str, Alignment]:
    """Return the scores of a target as other settings would have them, from the same coordinates.

    With the first half of the directions, and with each other aggregation.
    """
    stored, config = gist.views(job, name), job.config.gist
    halved = [replace(v, pool=_Half(v.pool), target=_Half(v.target)[:]) for v in stored]
    wanted: dict[str, tuple[Sequence[View], str]] = {}
    if config.directions == "leading" and max(v.target.shape[1] for v in halved) > 1:
        wanted["half the rank"] = (halved, config.aggregation)
    for other in ("max", "task-mean", "mean-cosine"):
        if other != config.aggregation:
            wanted[f"aggregation {other}"] = (stored, other)
    return {change: gist.align(job, name, *variant) for change, variant in wanted.items()}


def sampling_stage(inputs: Inputs, name: str) -> Stage:
    """Return the stage that measures a sample of the pool in twice as many directions."""
    settings, sources = scored_by(inputs, name)
    output = inputs.at(layout.stability_sample(name))
    return Stage(inputs.at(layout.stability(name)), settings, (output,), sources, cheap=True)


def measure_sample(job: Job, name: str, scores: Float[np.ndarray, " example"]) -> None:
    """Store coordinates of a sample of the pool in the directions after a target's own.

    An example is in it with a probability that falls with its place in the ranking: what is
    picked or nearly is dense, the rest is thin, and weights make up for it.
    """
    chances = _chances(scores)
    drawn = np.random.default_rng(_SEED).random(len(chances)) < chances
    rows = np.flatnonzero(drawn)
    tensors = {"rows": rows, "weights": 1 / chances[rows]}
    for checkpoint in job.checkpoints():
        # the leading half is stored: the basis of the rest is no larger than that of the pool pass
        parts, widths = by_target(job.targets, {name: _further(job, name, checkpoint)})
        args = (job.models, checkpoint.path, parts, widths, job.config)
        factory = partial(make_projection_measure, *args)
        work = partial(measure_examples, job.pool, rows, factory, job.config.engine)
        measured = job.call(work)
        tensors |= {f"{checkpoint.label}/{key}": values for key, values in measured.items()}
    path = job.path(layout.stability_sample(name))
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, partial(save_file, tensors))


def can_compare_twice_the_rank(job: Job, name: str) -> bool:
    """Return whether more directions could have been kept, and picks be compared on a sample.

    On a sample there is only the plain top by count: no rankings, no caps, no count of tokens.
    Where an index is asked, no sample of the pool is measured.
    """
    policy, gist_config = job.config.policy, job.config.gist
    plain = policy.strategy == "top" and not policy.source_cap
    counted = Budget.parse(policy.budget).unit != "tok"
    return (
        plain
        and counted
        and job.inputs.asks is None
        and gist_config.directions == "leading"
        and any(_further(job, name, checkpoint).shape[1] for checkpoint in job.checkpoints())
    )


def compare_with_twice_the_rank(
    job: Job,
    name: str,
    picks: Int[np.ndarray, " pick"],
    repeated: Int[np.ndarray, " row"],
    pool: Candidates,
) -> Change:
    """Return what twice the rank would have picked, estimated on the sample.

    As many are picked as the sample says were picked before, so that the same ranking gives 1.
    """
    tensors = load_file(job.path(layout.stability_sample(name)))
    rows, weights, views, ranks = tensors["rows"], tensors["weights"], [], set()
    for checkpoint in job.checkpoints():
        stored = gist.COORDINATES.read(job, name, checkpoint.label)[rows]
        of_target = f"{checkpoint.label}/{name}"
        units, lengths = (tensors[f"{of_target}/{key}"] for key in ("coordinates", "length"))
        further = StoredCoordinates(units, lengths)[:]
        wider = _wider(job, name, checkpoint)
        ranks.add(wider.rank)
        views.append(
            View(
                pool=np.concatenate([stored, further], axis=1),
                target=wider.coordinates.astype(np.float32),
                weight=checkpoint.weight,
                gradient_norms=tensors[f"{checkpoint.label}/gradient_norm"],
            )
        )
    aligned = gist.align(job, name, views, job.config.gist.aggregation)
    target = dedup_columns(job.targets[name], job.config.data.columns)
    repeats = DuplicateFinder(pool.texts, target, _without_near(job.config.policy), upcoming=list)
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
    settings = f"up to twice the rank ({', '.join(map(str, sorted(ranks)))})"
    return Change(settings, float(jaccard), len(rows))


def _wider(job: Job, name: str, checkpoint: Checkpoint) -> Subspace:
    """Return the subspace of twice the rank of a stored one, or of all that the target spans."""
    own = gist.stored_subspace(job, name, checkpoint)
    gram = load_gram(job.path(layout.subspace(name, checkpoint.label)))
    return fit_subspace(gram, min(2 * own.rank, own.span))


def _further(job: Job, name: str, checkpoint: Checkpoint) -> Float[np.ndarray, "query direction"]:
    """Return the combinations that make the directions between the rank and twice the rank."""
    kept = gist.stored_subspace(job, name, checkpoint).rank
    return np.ascontiguousarray(_wider(job, name, checkpoint).combination[:, kept:])


def _without_near(policy: PolicyConfig) -> PolicyConfig:
    """Return the policy that knows exact repeats alone: near ones take as long as picking."""
    keys = ("duplicates", "decontaminate")
    return policy.model_copy(update={k: "exact" for k in keys if getattr(policy, k) == "near"})


def _chances(scores: Float[np.ndarray, " example"]) -> Float[np.ndarray, " example"]:
    """Return how likely each example is to be in the sample: the best for sure, then ~ 1/place."""
    places = np.empty(len(scores))
    places[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return np.minimum(1, _DENSITY / places)

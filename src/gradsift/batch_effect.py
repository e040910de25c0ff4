"""How far scores move with what shares an example's batch: `gradsift plan --check`.

In exact arithmetic an example's gradient knows nothing of padding and batch mates. In floating
point a matrix product of another shape adds up in another order, so that its rounding differs, and
in bfloat16 one sees it in the scores. How far is measured on a few pool examples: each alone, all
together in batches of the run's size (with others, where they do not fill one), and every second of
them together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from gradsift.config import Config, ModelConfig
from gradsift.data.encoded import EncodedSet
from gradsift.data.encoding import Encoded
from gradsift.errors import GradsiftError, NumericsError
from gradsift.gradients.basis import fitting_basis
from gradsift.gradients.distinct import distinct_examples, merge_rows
from gradsift.gradients.gram import fitting_gram
from gradsift.gradients.projection import Projections, project
from gradsift.gradients.subspace import Subspace, fit_subspace
from gradsift.methods.job import Job
from gradsift.models.batch_size import is_out_of_memory, within_memory
from gradsift.models.batches import lengths_of
from gradsift.models.cache import ModelCache
from gradsift.models.kernels import precision_of
from gradsift.scores.alignment import Alignment
from gradsift.scores.similarity import Cosines, View

if TYPE_CHECKING:
    from peft import PeftModel

Rows = Float[np.ndarray, "composition example direction"]
Norms = Float[np.ndarray, "composition example"]
logger = logging.getLogger(__name__)

_POOL_EXAMPLES = 16
_DRAWN_FROM = 1024  # examples of the pool, among which those are spread by length
_TARGET_EXAMPLES = 32  # of each target, whose gradients make its subspace
_NEGLIGIBLE = 1e-4  # of a cosine
_SHARE_OF_GAP = 0.1  # of that between neighbouring scores


@dataclass(frozen=True)
class Movement:
    """How far things move between three compositions of batches, in one setting of the model.

    `score`: the largest difference of an example's score for a target; `coordinates`: the largest
    ‖c − c'‖/‖c‖, c being an example's coordinates for a target when it is alone; `places`: the
    most places that an example moves in the order of the scores. For scale: `spread` from the
    lowest score to the highest, `gap` between neighbours in the median, each of the target where it
    is smallest. `seconds`: of the examples in batches of the run's size, the subspace not counted.
    """

    dtype: str
    attention: str
    quantized: bool
    score: float
    coordinates: float
    places: int
    spread: float
    gap: float
    seconds: float


@dataclass(frozen=True)
class BatchEffect:
    """What batches do to the scores of some pool examples.

    `tried`: the run's own setting, then others; `not_tried`: why others could not be, by their
    names; `advice`: which of them would lower the difference, or that none is needed.
    """

    num_examples: int
    tried: Sequence[Movement]
    not_tried: Mapping[str, str]
    advice: str


def measure_batch_effect(job: Job, adapter: Path, batch_tokens: int) -> BatchEffect:
    """Return how far scores move between batch compositions, in the run's setting and in others.

    The model is loaded anew for each. `batch_tokens` are those of the pool pass.

    Raises:
        GradsiftError: If the run's own setting fails; others are named with the reason.
    """
    trial = _Trial.of(job, adapter, batch_tokens)
    own = trial.measure(job.config.model)
    tried, not_tried = [own], {}
    if own.quantized:
        not_tried["float32"] = "the base model is quantized: attention alone can be another"
    for settings in _alternatives(job.config.model, own):
        try:
            tried.append(trial.measure(settings))
        except (GradsiftError, RuntimeError) as error:
            if not isinstance(error, GradsiftError) and not _is_of_setting(error):
                raise
            not_tried[f"{settings.dtype}, {settings.attention}"] = str(error)
    return BatchEffect(len(trial.pool), tuple(tried), not_tried, advise(tried))


def _alternatives(model: ModelConfig, own: Movement) -> Iterator[ModelConfig]:
    """Yield the run's setting with other attention, then in float32."""
    for attention in ("eager", "sdpa"):
        if attention != own.attention:
            yield model.model_copy(update={"dtype": own.dtype, "attention": attention})
    if own.dtype != "float32" and not own.quantized:
        # kernels of flash attention have no float32
        attention = "sdpa" if "flash" in own.attention else own.attention
        yield model.model_copy(update={"dtype": "float32", "attention": attention})


def _is_of_setting(error: RuntimeError) -> bool:
    """Return whether memory ran out, or a kernel has no deterministic form: another may do."""
    return is_out_of_memory(error) or "deterministic" in str(error)


def advise(tried: Sequence[Movement]) -> str:
    """Return what to do, given what was found with the run's setting and then with others.

    >>> own = Movement("bfloat16", "sdpa", False, 0.02, 0.1, 2, 0.9, 0.05, 1.0)
    >>> other = Movement("float32", "sdpa", False, 1e-6, 1e-5, 0, 0.9, 0.05, 2.0)
    >>> print(advise([own, other]))
    a score moves by up to 0.02 with what shares its batch, the median gap between neighbouring
    scores being 0.05; it is lowered most by --set model.dtype=float32 (to 1e-06)
    """
    own, *others = tried
    gap = f"the median gap between neighbouring scores being {own.gap:.1g}"
    found = f"a score moves by up to {own.score:.1g} with what shares its batch, {gap}"
    if own.score <= max(_NEGLIGIBLE, _SHARE_OF_GAP * own.gap):
        return f"{found}: below {_NEGLIGIBLE:.0e} or a tenth of the gap no other setting is needed"
    better = sorted(
        (other for other in others if other.score <= own.score / 2), key=lambda other: other.score
    )
    if not better:
        return f"{found}; none of the settings tried halves it"
    ways = [f"{_change(own, other)} (to {other.score:.1g})" for other in better]
    return f"{found}; it is lowered most by {', then by '.join(ways)}"


def _change(own: Movement, other: Movement) -> str:
    """Return the flags that lead from one setting of the model to another."""
    changed = (key for key in ("dtype", "attention") if getattr(own, key) != getattr(other, key))
    return " ".join(f"--set model.{key}={getattr(other, key)}" for key in changed)


@dataclass(frozen=True)
class _Target:
    """Some examples of a target: the different ones, which of them each is, and their tasks."""

    examples: Sequence[Encoded]
    inverse: Int[np.ndarray, " query"]
    tasks: list[str]

    @classmethod
    def of(cls, target: EncodedSet, tasks: list[str]) -> _Target:
        """Draw some of a target's examples."""
        rows = np.random.default_rng(0).permutation(len(target))[:_TARGET_EXAMPLES]
        examples, inverse = distinct_examples(target, rows)
        return cls(examples, inverse, [tasks[row] for row in rows])

    def fit(self, model: PeftModel, config: Config) -> Subspace:
        """Return the subspace of these examples, of the run's rank where they span as much."""
        gram = fitting_gram(model, self.examples, config.engine)[np.ix_(self.inverse, self.inverse)]
        rank, which = config.gist.rank, config.gist.directions
        if isinstance(rank, int):
            span = fit_subspace(gram, "full", precision_of(model)).span
            rank = min(rank, span - (which == "tail"))
        return fit_subspace(gram, rank, precision_of(model), which)


@dataclass(frozen=True)
class _Trial:
    """The examples and all that is the same in every setting of the model.

    `pool`: different examples from the shortest to the longest, so that batches are padded;
    `mates`: others that fill a batch of the run's size with them.
    """

    config: Config
    adapter: Path
    batch_tokens: int
    pool: Sequence[Encoded]
    mates: Sequence[Encoded]
    targets: Sequence[_Target]

    @classmethod
    def of(cls, job: Job, adapter: Path, batch_tokens: int) -> _Trial:
        """Draw the examples."""
        lengths = job.pool.column("num_tokens").to_numpy()
        drawn = np.random.default_rng(0).permutation(len(lengths))[:_DRAWN_FROM]
        by_length = drawn[np.argsort(lengths[drawn], kind="stable")]
        places = np.linspace(0, len(drawn) - 1, min(len(drawn), _POOL_EXAMPLES)).astype(int)
        pool, _ = distinct_examples(job.pool, by_length[places])
        others = np.setdiff1d(drawn, by_length[places])
        filled = np.cumsum(lengths[others]) + lengths[by_length[places]].sum()
        mates = job.pool.examples(others[: np.searchsorted(filled, batch_tokens)])
        targets = [_Target.of(own, job.tasks(name)) for name, own in job.targets.items()]
        return cls(job.config, adapter, batch_tokens, pool, mates, targets)

    def measure(self, settings: ModelConfig) -> Movement:
        """Return how far things move in one setting of the model, which is loaded for it.

        Raises:
            GradsiftError: If it cannot be loaded or run so, or gradients are not finite.
        """
        model = ModelCache(settings, self.config.engine.deterministic).with_adapter(self.adapter)
        dtype, attention = precision_of(model), str(model.config._attn_implementation)
        logger.info("the check in %s, attention %s", dtype, attention)
        subspaces = [target.fit(model, self.config) for target in self.targets]
        parts = [
            (own.examples, merge_rows(subspace.combination, own.inverse, len(own.examples)))
            for own, subspace in zip(self.targets, subspaces, strict=True)
        ]
        basis = fitting_basis(model, parts, self.config)
        work = partial(_compose, partial(project, model, basis=basis), self.pool, self.mates)
        (rows, norms, seconds), _ = within_memory(work, self.batch_tokens, lengths_of(self.pool))
        if not np.isfinite(rows).all():
            raise NumericsError(
                f"a pool gradient is not finite in {dtype}; try another model.dtype"
            )
        pieces = np.split(rows, np.cumsum([own.rank for own in subspaces])[:-1], axis=2)
        compared = zip(self.targets, subspaces, pieces, strict=True)
        scores = np.stack([self._scores(*own, norms) for own in compared])
        return Movement(
            dtype=dtype,
            attention=attention,
            quantized=bool(getattr(model, "is_quantized", False)),
            coordinates=max(map(_relative_difference, pieces)),
            seconds=seconds,
            **_differences(scores),
        )

    def _scores(
        self,
        target: _Target,
        subspace: Subspace,
        coordinates: Rows,
        gradient_norms: Norms,
    ) -> Float[np.ndarray, "composition example"]:
        """Return the scores for a target, as the run would score its pool."""
        settings, reference = self.config.gist, subspace.coordinates.astype(np.float32)
        scores = []
        for rows, norms in zip(coordinates, gradient_norms, strict=True):
            cosines = Cosines([View(rows, reference, gradient_norms=norms)], settings.norm_power)
            scores.append(Alignment(cosines, target.tasks, settings.aggregation).scores()[0])
        return np.stack(scores)


def _differences(
    scores: Float[np.ndarray, "target composition example"],
) -> dict[str, Any]:
    """Return what differs between compositions of the target where it does so most, and scales."""
    places = scores.argsort(axis=2, kind="stable").argsort(axis=2)
    alone = np.sort(scores[:, 0], axis=1)
    gaps = np.diff(alone) if alone.shape[1] > 1 else np.zeros((1, 1))
    return {
        "score": float(np.ptp(scores, axis=1).max()),
        "places": int(np.ptp(places, axis=1).max()),
        "spread": float(np.ptp(alone, axis=1).min()),
        "gap": float(np.median(gaps, axis=1).min()),
    }


def _relative_difference(rows: Rows) -> float:
    """Return the largest ‖c − c'‖/‖c‖, the first composition giving c; a zero row has none."""
    lengths = np.linalg.norm(rows[0], axis=1)
    moved = np.linalg.norm(rows - rows[0], axis=2).max(axis=0)
    return float((moved / np.where(lengths > 0, lengths, np.inf)).max())


def _compose(
    run: Callable[[Sequence[Encoded], int], Projections],
    pool: Sequence[Encoded],
    mates: Sequence[Encoded],
    max_tokens: int,
) -> tuple[Rows, Norms, float]:
    """Return coordinates and norms of the examples alone, with all mates, every second together.

    And the seconds that those with all mates took.
    """
    coordinates, norms, seconds, examples = [], [], [], [*pool, *mates]
    own, everything = range(len(pool)), range(len(examples))
    halves = [half for half in (own[::2], own[1::2]) if half]
    for groups, tokens in (([own], 1), ([everything], max_tokens), (halves, max_tokens)):
        started = time.perf_counter()
        found = [run([examples[i] for i in rows], tokens) for rows in groups]
        order = np.argsort(np.concatenate(groups))[: len(pool)]
        coordinates.append(
            np.concatenate([part.coordinates.cpu().numpy() for part in found])[order]
        )
        norms.append(np.concatenate([part.gradient_norms.cpu().numpy() for part in found])[order])
        seconds.append(time.perf_counter() - started)
    return np.stack(coordinates), np.stack(norms), seconds[1]

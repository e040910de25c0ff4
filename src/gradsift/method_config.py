"""The settings of single methods, a section for each that has any."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from gradsift.sections import MAX_COUNT, Count, Section, Seed, parse_share, setting
from gradsift.types import FusedMethodName


class GistConfig(Section):
    """The subspace and the score (Min et al., 2026, arXiv 2602.18584)."""

    rank: int | str = setting(
        "auto",
        "directions kept: auto (95% of the variance; all for up to 16 examples), full, a share, "
        "a count",
        "auto",
    )
    directions: Literal["leading", "tail"] = setting(
        "leading", "tail: those that the rank leaves out, instead", "leading"
    )
    aggregation: Literal["max", "task-mean", "mean-cosine"] = setting(
        "max", "how target examples count: the nearest (max), or means within a task", "max"
    )
    norm_power: float = setting(
        0.0, "weighs scores by the share of the gradient in the subspace, to this power", "0", ge=0
    )

    @field_validator("rank")
    @classmethod
    def _known_rank(cls, rank: int | str) -> int | str:
        if isinstance(rank, str) and rank.isdecimal():
            rank = int(rank)
        if isinstance(rank, int):
            if rank < 1:
                raise ValueError(f"expected at least 1, found {rank}")
        elif rank not in ("auto", "full"):
            parse_share(rank)
        return rank


class LessConfig(Section):
    """LESS (Xia et al., 2024, arXiv 2402.04333): one checkpoint per epoch of a longer warm-up."""

    checkpoints: Count = setting(4, "epochs of its warm-up, a checkpoint after each", "4")
    dimension: int = setting(
        8192, "numbers kept of each gradient", "8192", ge=64, le=MAX_COUNT, multiple_of=64
    )
    seed: Seed = setting(0, "draws the random projection (--seed)")


class InfluenceConfig(Section):
    """Influence under the empirical Fisher matrix of pool gradients (after Koh and Liang, 2017)."""

    samples: Count = setting(
        512, "random pool examples whose gradients make the Fisher matrix; all of a smaller pool"
    )
    damping: float = setting(
        0.1, "added to its diagonal, in mean eigenvalues; much more makes it `cosine`", gt=0
    )
    normalize: bool = setting(True, "divide by the length of the pool gradient")
    aggregation: Literal["max", "task-mean", "mean-cosine"] = setting(
        "mean-cosine", "how target examples count: the nearest (max), or means within a task"
    )
    seed: Seed = setting(0, "draws these examples (--seed)")


class EmbedConfig(Section):
    """The sentence encoder of the method `embed`."""

    model: str = setting(
        "sentence-transformers/gtr-t5-base", "a sentence-transformers folder or Hub id"
    )


class TargetPathConfig(Section):
    """The target's own warm-up of `target-path` (Yang et al., 2026, arXiv 2605.09404).

    Its other settings are those of `lora` (at the same scale) and `warmup`.
    """

    rank: Count = setting(1, "rank of the adapter that is trained on the target", "1")
    steps: Count = setting(512, "optimizer steps on the target's examples, whatever their number")
    learning_rate: float = setting(
        1e-5, "peak of AdamW's rate; a small model needs more", "1e-5", gt=0
    )
    batch_size: Count = setting(1, "target examples per optimizer step")
    seed: Seed = setting(0, "draws order, first weights, dropout (--seed)")


class FuseConfig(Section):
    """Reciprocal rank fusion (Cormack, Clarke, Büttcher, 2009)."""

    methods: tuple[FusedMethodName, ...] = setting(
        ("gist", "rds", "bm25"), "methods whose rankings are fused"
    )

    @field_validator("methods")
    @classmethod
    def _several_once_each(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if len(methods) < 2:
            raise ValueError(f"expected two methods or more, found {len(methods)}")
        for name in methods:
            if methods.count(name) > 1:
                raise ValueError(f"expected each method once, found {name!r} more than once")
        return methods


class RandomConfig(Section):
    """The order of the method `random`."""

    seed: Seed = setting(0, "draws the order (--seed)")

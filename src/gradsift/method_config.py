"""Sections of single methods: those that hold nothing which others share."""

from __future__ import annotations

from pydantic import field_validator

from gradsift.sections import Count, Section, Seed, setting
from gradsift.types import FusedMethodName


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

"""How much `gradsift geometry` measures."""

from __future__ import annotations

from pydantic import Field

from gradsift.sections import MAX_COUNT, Count, Section, Seed


class GeometryConfig(Section):
    """How much is measured; the seed draws examples, probes and the first vector of Lanczos."""

    examples: int = Field(
        default=32, ge=2, le=MAX_COUNT, description="of each target, for the Hessian"
    )
    eigenvectors: Count = Field(default=10, description="leading ones of the Hessian")
    probes: int = Field(default=4, ge=3, le=MAX_COUNT, description="random vectors per LoRA matrix")
    seed: Seed = 0

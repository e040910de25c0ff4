"""How much `gradsift geometry` measures."""

from __future__ import annotations

from gradsift.sections import MAX_COUNT, Count, Section, Seed, setting


class GeometryConfig(Section):
    """How much is measured; the seed draws examples, probes and the first vector of Lanczos."""

    examples: int = setting(
        32, "examples of each target, for the Hessian (--examples)", ge=2, le=MAX_COUNT
    )
    eigenvectors: Count = setting(
        10, "leading eigenvectors of the Hessian to find (--eigenvectors)"
    )
    probes: int = setting(4, "random vectors per LoRA matrix (--probes)", ge=3, le=MAX_COUNT)
    seed: Seed = setting(0, "draws examples, probes and the first Lanczos vector (--seed)")

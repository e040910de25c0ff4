from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    seconds: float
    tokens: int
    flops: float


def cost_of(job, stages):
    return Cost(0.0, 0, 0.0)

"""The dose and the response: is the loss lower, the higher scored what was trained on?

Fine-tunings on random draws from each part of a method's ranking say whether its scores mean
anything from top to bottom, and not at the top alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.evaluation.statistics import Interval, Variance, correlation, ranks

_DRAWS = 4000


@dataclass(frozen=True)
class DoseResponse:
    """How a target's loss follows the parts of a method's ranking, the best-scored first.

    `losses`: of each part, nats per token; `error`: standard error of each from its trainings.
    `trend`: Spearman's correlation of part and loss; positive: the higher scored, the lower the
    loss.
    """

    target: str
    method: str
    losses: tuple[float, ...]
    error: float
    trend: Interval

    @property
    def said(self) -> str:
        """What the trend says of the scores."""
        if self.trend.low > 0:
            return "the higher scored, the lower the loss"
        if self.trend.high < 0:
            return "the higher scored, the higher the loss"
        return "no trend beyond the noise"

    @property
    def sentence(self) -> str:
        """The same with the method and the numbers.

        >>> DoseResponse("t", "gist", (1.0, 1.1, 1.2), 0.02, Interval(1.0, 0.5, 1.0)).sentence
        'gist: the higher scored, the lower the loss (trend +1.00 [+0.50, +1.00]).'
        """
        value, low, high = self.trend.value, self.trend.low, self.trend.high
        return f"{self.method}: {self.said} (trend {value:+.2f} [{low:+.2f}, {high:+.2f}])."


def dose_response(
    name: tuple[str, str],
    parts: Sequence[Float[np.ndarray, "_ example"]],
    num_tokens: Int[np.ndarray, " example"],
    noise: Variance,
    seed: int = 0,
) -> DoseResponse:
    """Return how the loss follows the parts of a ranking, the best-scored first.

    `name`: target and method. `noise`: variance of the loss of one training, that of random
    selections: one training on each part tells nothing of its own. The interval is that of the
    trend of the parts' true losses, given what was found: held-out examples drawn with replacement,
    the same for all parts, and the noise of trainings, of t's shape because its size is itself
    estimated.
    """
    rng = np.random.default_rng(seed)
    rows, counts = np.stack([own.mean(axis=0) for own in parts]), np.array([len(p) for p in parts])
    losses = rows @ (num_tokens / num_tokens.sum())
    num_examples = len(num_tokens)
    drawn = rng.multinomial(num_examples, np.full(num_examples, 1 / num_examples), _DRAWS)
    weights = drawn * num_tokens
    resampled = weights @ rows.T / weights.sum(axis=1, keepdims=True)
    scale = np.sqrt(noise.value * noise.df / rng.chisquare(noise.df, size=(_DRAWS, 1)))
    errors = rng.normal(size=(_DRAWS, len(parts))) * scale / np.sqrt(counts)
    low, high = np.percentile(_trend(resampled + errors), (2.5, 97.5))
    value = float(_trend(losses[None])[0])
    trend = Interval(value, min(float(low), value), max(float(high), value))
    error = float(np.sqrt(noise.value / counts.mean()))
    return DoseResponse(*name, tuple(losses.tolist()), error, trend)


def _trend(losses: Float[np.ndarray, "draw part"]) -> Float[np.ndarray, " draw"]:
    places = np.broadcast_to(np.arange(losses.shape[1], dtype=np.float64), losses.shape)
    return correlation(places, ranks(losses))

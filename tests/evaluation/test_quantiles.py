"""The dose and the response: a trend is found where there is one, and not where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from gradsift.evaluation.quantiles import DoseResponse, dose_response
from gradsift.evaluation.statistics import Variance

SPREAD = 0.01


def found(rng: np.random.Generator, slope: float, trainings: int = 1) -> DoseResponse:
    """Return what five parts say: each is worse by `slope` deviations of a training's loss."""
    num_tokens, hard = rng.integers(5, 100, size=60), rng.gamma(4, 0.4, size=60)
    weights = num_tokens / num_tokens.sum()

    def training(shift: float) -> np.ndarray:
        single = rng.normal(size=60) * np.sqrt(0.5 / (weights**2).sum())
        return hard + SPREAD * (shift + np.sqrt(0.5) * rng.normal() + single)

    parts = [np.stack([training(slope * part) for _ in range(trainings)]) for part in range(5)]
    at_random = [training(slope * 2) @ weights for _ in range(5)]
    noise = Variance(float(np.var(at_random, ddof=1)), 4)
    return dose_response(("t", "gist"), parts, num_tokens, noise)


def test_losses_are_those_of_the_parts() -> None:
    num_tokens = np.array([1, 3])
    parts = [np.array([[1.0, 2.0]]), np.array([[2.0, 4.0], [4.0, 6.0]]), np.array([[9.0, 9.0]])]
    response = dose_response(("t", "gist"), parts, num_tokens, Variance(1e-6, 4))
    assert response.losses == pytest.approx((1.75, 4.5, 9.0))
    assert response.trend.value == response.trend.low == response.trend.high == 1
    assert (
        response.sentence
        == "gist: the higher scored, the lower the loss (trend +1.00 [+1.00, +1.00])."
    )
    turned = dose_response(("t", "gist"), parts[::-1], num_tokens, Variance(1e-6, 4))
    assert turned.trend.high == -1
    assert "the higher scored, the higher the loss" in turned.sentence


def test_noise_widens_the_interval() -> None:
    num_tokens, parts = np.array([2, 2]), [np.full((1, 2), 1.0 + n / 10) for n in range(5)]
    sure = dose_response(("t", "m"), parts, num_tokens, Variance(1e-8, 4))
    unsure = dose_response(("t", "m"), parts, num_tokens, Variance(0.04, 4))
    assert sure.trend.low == 1
    assert unsure.trend.low < 0 < unsure.trend.value == unsure.trend.high == 1
    assert "no trend beyond the noise" in unsure.sentence
    assert unsure.error == pytest.approx(0.2)


@pytest.mark.slow
def test_a_trend_is_found_where_there_is_one() -> None:
    rng = np.random.default_rng(0)
    none = [found(rng, 0.0).trend for _ in range(200)]
    assert np.mean([t.low > 0 or t.high < 0 for t in none]) <= 0.07
    steep = [found(rng, 2.0).trend for _ in range(60)]
    assert np.mean([t.low > 0 for t in steep]) > 0.9
    assert np.mean([t.high == 1 for t in steep]) > 0.9

"""Widths, decays and least squares of power-function averages, against the definitions integrated numerically."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldmscale.train.engine.ema import PowerEma, Profile, coefficients, exponent, inner_product


def profile(gamma: float, last: float, at: np.ndarray) -> np.ndarray:
    return np.where(at <= last, (gamma + 1) * at**gamma / last ** (gamma + 1), 0.0)


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_the_width_is_the_standard_deviation_of_the_profile_over_its_end(width: float) -> None:
    at = (np.arange(200_000) + 0.5) / 200_000
    weight = profile(exponent(width), 1.0, at)
    mean = (weight * at).mean()
    assert np.sqrt((weight * (at - mean) ** 2).mean()) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.0, 0.3, -0.1])
def test_a_width_that_no_power_function_has_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match="relative width"):
        exponent(width)


def test_inner_products_are_the_integrals() -> None:
    at = (np.arange(1_000_000) + 0.5) / 10_000  # up to 100
    for one, other in (((0.05, 100), (0.1, 60)), ((0.2, 40), (0.2, 80)), ((0.1, 70), (0.1, 70))):
        first, second = (profile(exponent(width), last, at) for width, last in (one, other))
        expected = (first * second).sum() / 10_000
        assert inner_product(Profile(*one), Profile(*other)) == pytest.approx(expected, rel=1e-5)


def test_the_average_by_updates_is_the_closed_form_over_the_trajectory() -> None:
    weight = torch.zeros(1, dtype=torch.float64)
    average = PowerEma([weight], 0.1)
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for value in values:
        weight.fill_(value)
        average.update()
    power = exponent(0.1) + 1
    shares = torch.tensor([(k / 50) ** power - ((k - 1) / 50) ** power for k in range(1, 51)])
    assert average.averages[0].item() == pytest.approx(float((shares.double() * values).sum()), rel=1e-6)


def test_a_tracked_width_is_taken_as_it_is_and_another_one_to_the_told_distance() -> None:
    tracked = [Profile(width, last) for last in range(20, 401, 20) for width in (0.05, 0.1)]
    solved, distance = coefficients(tracked, Profile(0.1, 400))
    assert distance < 1e-5 and solved[-1] == pytest.approx(1.0, abs=1e-4)
    solved, distance = coefficients(tracked, Profile(0.08, 400))
    at = (np.arange(400_000) + 0.5) / 1000
    made = sum(c * profile(exponent(p.width), p.updates, at) for c, p in zip(solved, tracked, strict=True))
    wanted = profile(exponent(0.08), 400, at)
    error = np.sqrt(((made - wanted) ** 2).sum() / (wanted**2).sum())
    assert error == pytest.approx(distance, rel=0.01) and error < 0.005
    with pytest.raises(ValueError, match="at update 10"):
        coefficients(tracked, Profile(0.08, 10))

"""Power-function averages of weights, and how one of any width follows from two that were tracked (Karras et al. 2024).

The profile of exponent g at update t weighs the weights of update k by the integral of (g+1) u^g / t^(g+1) over
[k-1, k]. Its width is told as sigma_rel, the standard deviation of that profile relative to t: 0.10 reaches back over
about a tenth of the training. Only numpy: weights are combined elsewhere, by the coefficients found here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDEST = 12**-0.5  # sigma_rel of exponent 0: the plain mean of all updates


@dataclass(frozen=True)
class Profile:
    """A power-function average as it stood after `updates` updates."""

    width: float  # sigma_rel
    updates: int


def exponent(width: float) -> float:
    """The exponent g of a relative width: sigma_rel^2 = (g+1) / ((g+2)^2 (g+3)) (Karras et al. 2024, section 3.1).

    Raises ValueError outside (0, 12^-0.5].
    """
    if not 0.0 < width <= WIDEST + 1e-12:
        raise ValueError(f"relative width {width}: expected a number in (0, {WIDEST:.4f}]")
    # (g+2)^2 (g+3) s^2 - (g+1) = 0; the largest real root is the one with g >= 0.
    squared = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - squared, 12.0 - squared])
    return max(0.0, float(np.max(roots[np.abs(roots.imag) < 1e-6 * np.abs(roots).max()].real)))


def decay_of_update(gamma: float, update: int) -> float:
    """What is kept of the average at update number `update` (1 for the first): (1 - 1/update)^(gamma+1)."""
    return float((1.0 - 1.0 / update) ** (gamma + 1.0))


def inner_product(one: Profile, other: Profile) -> float:
    """Integral of the product of two profiles, in 1 / updates."""
    early, late = sorted((one, other), key=lambda profile: profile.updates)
    a, b = exponent(early.width), exponent(late.width)
    overlap = (early.updates / late.updates) ** b / late.updates
    return float((a + 1) * (b + 1) / (a + b + 1) * overlap)


def coefficients(tracked: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """The combination of tracked averages that is nearest to the target's profile (least squares).

    Returns:
        One coefficient for each tracked average, float64, and how far the combined profile is from the target, as
        a share of the target's norm: 0 is exact.

    Raises:
        ValueError: no average was tracked, or one is later than the target.
    """
    if not tracked or any(profile.updates > target.updates for profile in tracked):
        raise ValueError(
            f"the average at update {target.updates} needs tracked averages of that update or before, "
            f"and there are those of {sorted({profile.updates for profile in tracked})}"
        )
    gram = np.array([[inner_product(one, other) for other in tracked] for one in tracked])
    wanted = np.array([inner_product(one, target) for one in tracked])
    # Profiles of neighbouring snapshots are nearly alike: scaled to norm 1, and solved by least squares.
    norms = np.sqrt(np.diag(gram))
    solved = np.linalg.lstsq(gram / np.outer(norms, norms), wanted / norms, rcond=1e-13)[0] / norms
    norm = inner_product(target, target)
    left = norm - 2 * solved @ wanted + solved @ gram @ solved
    return solved, float(np.sqrt(max(left, 0.0) / norm))

"""Moving averages of weights, kept in shards: exponential ones of any decay, and power-function ones.

Each rank averages only the fp32 master elements that it owns, on the flat tensors that the optimiser steps
on, so the average costs one `lerp` per update, needs no communication, and is as exact under ZeRO-3 as on one
device. The forward pass uses the average through `Engine.averaged_weights`.

Of two power-function averages that were tracked, one of any width follows (Karras et al. 2024). The profile of exponent g
at update t weighs the weights of update k by the integral of (g+1) u^g / t^(g+1) over [k-1, k]. Its width is given as
sigma_rel, the standard deviation of that profile relative to t: 0.10 reaches back over about a tenth of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_EXCHANGE_ELEMENTS = 1 << 24  # weights change places with their average in pieces of 64 MiB
MAIN = "ema"  # the kind of the average that pictures are drawn by and that `load` takes


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


class ShardedEma:
    """fp32 average of the masters on this rank: a <- a + (1 - d) (w - a).

    `masters` are the tensors of `Engine.masters`. With `warmup` the decay of update n (1 for the first) is
    min(decay, (1 + n) / (10 + n)), as in the published models' LitEma, so that the random start is forgotten
    soon. `kind` names the average in checkpoints; a network with several averages gives each its own.
    """

    def __init__(
        self, masters: Sequence[Tensor], decay: float, *, warmup: bool = True, kind: str = MAIN
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay {decay}: expected a number in [0, 1)")
        self.kind = kind
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._masters = [master.detach() for master in masters]
        self.averages = [master.clone() for master in self._masters]

    def current_decay(self) -> float:
        """The decay that the next update uses."""
        count = self.updates + 1
        return min(self.decay, (1 + count) / (10 + count)) if self.warmup else self.decay

    def description(self) -> dict[str, float]:
        """What a checkpoint stores of it besides its weights."""
        return {"updates": self.updates, "decay": self.decay}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the masters as they are now; call it after each optimiser update."""
        weight = 1.0 - self.current_decay()
        self.updates += 1
        torch._foreach_lerp_(self.averages, self._masters, weight)

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the masters as they are now."""
        self.updates = 0
        for average, master in zip(self.averages, self._masters, strict=True):
            average.copy_(master)


class PowerEma(ShardedEma):
    """The average by a power function of the updates' numbers (Karras et al. 2024, eq. 2): it widens as training goes on.

    Two of them, and snapshots of both, give the average of any width after the training (`ldmscale.inference.averages`).
    The random start has no part in it: the first update replaces it.
    """

    def __init__(self, masters: Sequence[Tensor], width: float) -> None:
        """`width`: sigma_rel, in (0, 12^-0.5]."""
        super().__init__(masters, 0.0, warmup=False, kind=power_kind(width))
        self.width = width
        self._exponent = exponent(width)

    def current_decay(self) -> float:
        return decay_of_update(self._exponent, self.updates + 1)

    def description(self) -> dict[str, float]:
        return {"updates": self.updates, "width": self.width}


def decay_kind(decay: float) -> str:
    """What checkpoints call a further exponential average."""
    return f"ema_{decay:g}"


def power_kind(width: float) -> str:
    """What checkpoints call a power-function average."""
    return f"power_{width:g}"


# Of each network by its name; the first is the one that pictures are drawn by.
Averages = Mapping[str, Sequence[ShardedEma]]


def main_average(averages: Averages, network: str) -> ShardedEma | None:
    """The average that a network's pictures are drawn by, if it has any."""
    return next(iter(averages.get(network, ())), None)


@torch.no_grad()
def swap_(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Swap the contents of tensors pairwise, in place, through a small buffer."""
    for one, other in zip(left, right, strict=True):
        ones, others = one.detach().view(-1), other.view(-1)
        halves = torch.split(ones, _EXCHANGE_ELEMENTS), torch.split(others, _EXCHANGE_ELEMENTS)
        for a, b in zip(*halves, strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

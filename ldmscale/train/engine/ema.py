"""Moving averages of weights, kept in shards: exponential ones of any decay, and power-function ones.

Each rank averages only the fp32 master elements that it owns, on the flat tensors that the optimiser steps
on, so the average costs one `lerp` an update, needs no communication, and is as exact under ZeRO-3 as on one
device. The forward pass sees the average through `Engine.averaged_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldmscale.train.engine.power_ema import decay_of_update, exponent

_EXCHANGE_ELEMENTS = 1 << 24  # weights change places with their average in pieces of 64 MiB
MAIN = "ema"  # the kind of the average that pictures are drawn by and that `load` takes


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
        """What a checkpoint says of it beside its weights."""
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
def exchange(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Swap the contents of tensors pairwise, in place, through a small buffer."""
    for one, other in zip(left, right, strict=True):
        ones, others = one.detach().view(-1), other.view(-1)
        halves = torch.split(ones, _EXCHANGE_ELEMENTS), torch.split(others, _EXCHANGE_ELEMENTS)
        for a, b in zip(*halves, strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

"""The exponential moving average of weights, kept in shards.

Each rank averages only the fp32 master elements that it owns, on the flat tensors that the optimiser steps
on, so the average costs one `lerp` an update, needs no communication, and is as exact under ZeRO-3 as on one
device. The forward pass sees the average through `Engine.averaged_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ShardedEma:
    """fp32 average of the masters on this rank: a <- a + (1 - d) (w - a).

    `masters` are the tensors of `Engine.masters`. With `warmup` the decay of update n (1 for the first) is
    min(decay, (1 + n) / (10 + n)), as in the published models' LitEma, so that the random start is forgotten
    soon. `kind` names the average in checkpoints; a network with several averages gives each its own.
    """

    def __init__(
        self, masters: Sequence[Tensor], decay: float, *, warmup: bool = True, kind: str = "ema"
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

"""The one number that weighs reconstruction against the rest where it is trained: s in rec / exp(s) + s.

It lives outside the engines: a single number is the same on every rank as long as its gradient is averaged over them, and
has no use for shards. The published configurations never train it (no optimiser holds it), so it is off by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmscale.distributed.collectives import mean_over_ranks


class LogVariance:
    """s, with Adam's two moments where it is trained (Kingma & Ba 2015); no weight decay."""

    def __init__(
        self, start: float, *, learned: bool, passes: int, betas: tuple[float, float], eps: float
    ) -> None:
        self.value, self.learned = start, learned
        self.passes, self.betas, self.eps = passes, betas, eps  # passes: of one step
        self.mean = self.square = 0.0
        self.updates = 0
        self._gradients: list[Tensor] = []

    def collect(self, gradient: Tensor, rate: float) -> None:
        """Take in the gradient of one pass (a scalar); the last pass of a step updates s. Collective then."""
        if not self.learned:
            return
        self._gradients.append(gradient.detach())
        if len(self._gradients) < self.passes:
            return
        here = float(torch.stack(self._gradients).double().mean())
        self._gradients = []
        found = mean_over_ranks({"gradient": here})["gradient"]
        if not math.isfinite(found):
            return  # the engine throws such a step away, too
        self.updates += 1
        first, second = self.betas
        self.mean = first * self.mean + (1 - first) * found
        self.square = second * self.square + (1 - second) * found * found
        width = math.sqrt(self.square / (1 - second**self.updates)) + self.eps
        self.value -= rate * self.mean / (1 - first**self.updates) / width

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "mean": self.mean, "square": self.square, "updates": self.updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.value, self.updates = float(state["value"]), int(state["updates"])
        self.mean, self.square = float(state["mean"]), float(state["square"])

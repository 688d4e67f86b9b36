"""What the trainer, which knows when, needs of a stage, which knows what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ldmscale.tracking.metrics import PartialMean
from ldmscale.train.engine.ema import Averages
from ldmscale.train.engine.engine import Engine

Batch = Mapping[str, Any]  # position int64 [b], key list[str], and what the stage's reader gave


@dataclass(frozen=True)
class Picture:
    """For the tracker: a name, one uint8 [H,W,3] or several [N,H,W,3], and their captions."""

    name: str
    pixels: np.ndarray
    captions: tuple[str, ...] = ()


class Stage(Protocol):
    """One act of the training. Every method is called by all ranks together, at the same step."""

    engines: dict[str, Engine]  # the trained networks, by the names that checkpoints use
    averages: Averages  # averaged weights of some of them, by the same names

    def active(self, step: int) -> Sequence[str]:
        """Names of the networks that this step trains; `micro_step` has called their backward."""
        ...

    def micro_step(self, batch: Batch, step: int) -> Mapping[str, Tensor | PartialMean]:
        """Forward and backward of one micro-batch; returns scalar metrics of this rank, by path; "loss/total" as a tensor."""
        ...

    def pictures(self) -> Iterator[Picture]:
        """Pictures by the present (averaged) weights. Every rank draws its part; all ranks get all pictures."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures of held-out samples by the present (averaged) weights, the same on all ranks; none without such samples."""
        ...

    def generate(self) -> dict[str, float]:
        """Figures of images drawn by the present (averaged) weights, the same on all ranks; none where nothing is drawn."""
        ...

    def answer(self, batch: Batch) -> Tensor:
        """What the main network's raw weights make of a batch, without gradients and dropout; leaves no trace."""
        ...

    def finish(self) -> dict[str, float]:
        """What is measured after the last step and before the last save."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides weights and data position, as plain values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        ...

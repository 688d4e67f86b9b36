"""The interface between the trainer, which schedules steps, and a stage, which defines them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ldmscale.tracking.metrics import Metric
from ldmscale.train.engine.ema import Averages
from ldmscale.train.engine.engine import Engine

Batch = Mapping[
    str, Any
]  # position int64 [b], key list[str], and the fields that the stage's item maker adds


@dataclass(frozen=True)
class Picture:
    """An image for the tracker: a name, one uint8 [H,W,3] or several [N,H,W,3], and their captions."""

    name: str
    pixels: np.ndarray
    captions: tuple[str, ...] = ()


class Stage(Protocol):
    """One part of the training. All ranks call every method together, at the same step."""

    engines: dict[str, Engine]  # the trained networks, by the names that checkpoints use
    averages: Averages  # averaged weights of some of them, by the same names

    def active(self, step: int) -> Sequence[str]:
        """Names of the networks that this step trains; `micro_step` has called their backward."""
        ...

    def micro_step(self, batch: Batch, step: int) -> tuple[Tensor, Mapping[str, Metric]]:
        """Forward and backward of one micro-batch; returns its detached loss and further scalar metrics of this rank, by path."""
        ...

    def pictures(self) -> Iterator[Picture]:
        """Images by the current (averaged) weights. Every rank samples its share; all ranks get all images."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics of held-out samples by the current (averaged) weights, the same on all ranks; empty without such samples."""
        ...

    def generate(self) -> dict[str, float]:
        """Metrics of images sampled by the current (averaged) weights, the same on all ranks; empty where none are sampled."""
        ...

    def answer(self, batch: Batch) -> Tensor:
        """The main network's output for a batch by its raw weights, without gradients and dropout; changes no state."""
        ...

    def finish(self) -> dict[str, float]:
        """Metrics that are measured after the last step and before the last save."""
        ...

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint must hold besides weights and data position, as plain values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        ...

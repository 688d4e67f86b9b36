"""The interface between `Engine` and what trains a network: `DeepSpeedBackend` (ZeRO-1 to 3) or `ReplicatedEngine`."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldmscale.train.engine.master_weights import ShardLayout


class Counters(NamedTuple):
    """Since the start of the run."""

    micro_batches: int
    windows: int  # accumulation windows that have ended
    skipped_windows: int  # of them, those without an update


class Backend(Protocol):
    """Forward, backward and update of one network.

    An accumulation window is the micro-batches of one update. All ranks call `backward`, `step` and the sync of the
    layout together; every other method is local.
    """

    network: nn.Module
    layout: ShardLayout
    counters: Counters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Steps on the masters of the layout."""
        ...

    def __call__(self, *args: Any) -> Any:
        """The forward pass."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the mean loss of one micro-batch, divided by the number of micro-batches in a window."""
        ...

    def closes_window(self) -> bool:
        """Whether the next `step` ends the window."""
        ...

    def close_next_window(self, closes: bool) -> None:
        """True: the next backward and step end the window, whatever the counters; False: the counters decide again."""
        ...

    def step(self) -> None:
        """Follows each backward. Ends the window where `closes_window`: updates the weights unless a gradient is not finite.

        The gradients are judged by their norm over all ranks, so all ranks update, or none.
        """
        ...

    def update_applied(self) -> bool:
        """Whether the last `step` updated the weights."""
        ...

    def gradient_norm(self) -> float | Tensor:
        """Global 2-norm of the last window's mean gradient before clipping."""
        ...

    def invalidate_gradients(self) -> None:
        """Makes the window's gradient non-finite: the `step` that follows skips its update on all ranks.

        All ranks call it, after the last backward of the window and before its step. A skipped update thus takes the same
        way whether the gradient or the caller is the reason.
        """
        ...

    def discard_gradients(self) -> None:
        """Drops the gradients of the present window without a step, after a pass that raised. Local."""
        ...

    def gradients(self) -> list[Tensor]:
        """The gradients that this rank holds between the last backward of a window and its step."""
        ...

    def shard_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Offset and number of this rank's elements of a parameter that is sharded outside the optimizer (ZeRO-3)."""
        ...

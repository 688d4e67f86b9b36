"""Gathering a step's metrics: means over micro-batches and ranks, brought to the host once a log interval.

Keys are paths such as "loss/total". Values on a GPU are summed there; only `mean` waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmscale.distributed.collectives import gather_lists


@dataclass(frozen=True)
class PartialMean:
    """A metric that not every sample of a micro-batch has a part in: the mean over `samples` of them."""

    value: Tensor  # one element
    samples: int


Metric = Tensor | float | PartialMean


class MetricSums:
    """Weighted sums of metrics since the last `mean`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Metric], weight: float = 1.0) -> None:
        """Add the values of one micro-batch; `weight` is the number of samples (or steps) that they are means
        of. A PartialMean counts as its own number of samples.

        Tensors have one element; they are detached and stay on their device.
        """
        for key, given in values.items():
            value: Tensor | float
            if isinstance(given, PartialMean):
                value, own = given.value, float(given.samples)
            else:
                value, own = given, weight
            if isinstance(value, Tensor):
                # fp32 for the sum of bf16 losses; reshape lets shapes [] and [1] mix
                part: Tensor | float = value.detach().float().reshape(()) * own
            else:
                part = float(value) * own
            before = self._sums.get(key)
            self._sums[key] = part if before is None else before + part
            self._weights[key] = self._weights.get(key, 0.0) + own

    def mean(self) -> dict[str, float]:
        """Weighted means over everything added on all ranks, the same on all ranks; then start anew.

        Collective.

        Ranks may have different keys. Empty if no rank added anything.
        """
        local = [(key, total, self._weights[key]) for key, total in self._on_host().items()]
        self._sums.clear()
        self._weights.clear()
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for key, total, weight in gather_lists(local):
            sums[key] = sums.get(key, 0.0) + total
            weights[key] = weights.get(key, 0.0) + weight
        return {key: sums[key] / weights[key] for key in sums if weights[key] > 0}

    def _on_host(self) -> dict[str, float]:
        keys = [key for key, total in self._sums.items() if isinstance(total, Tensor)]
        tensors = [total for total in self._sums.values() if isinstance(total, Tensor)]
        # One copy for all tensors of a device: each copy is a wait.
        values: dict[str, float] = {}
        for device in {tensor.device for tensor in tensors}:
            names = [key for key, tensor in zip(keys, tensors, strict=True) if tensor.device == device]
            stacked = torch.stack([tensor for tensor in tensors if tensor.device == device])
            values.update(zip(names, stacked.tolist(), strict=True))
        return {key: total if isinstance(total, float) else values[key] for key, total in self._sums.items()}

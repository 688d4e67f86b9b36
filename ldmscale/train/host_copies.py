"""Copies of tensors in host memory, for a save that is written while the training goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopies:
    """Memory that every save uses again: once it is there, a copy costs no page faults.

    Beside a GPU it is page-locked, so that the copies of a save run together and one wait ends them all.
    What `take` gave holds until the next save takes the same key.
    """

    def __init__(self) -> None:
        self._boxes: dict[str, Tensor] = {}
        self._devices: set[torch.device] = set()

    def take(self, key: str, values: Tensor) -> Tensor:
        """A copy of a 1-D tensor, on its way until `wait`."""
        box = self._boxes.get(key)
        if box is None or box.shape != values.shape or box.dtype != values.dtype:
            box = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._boxes[key] = box
        box.copy_(values.detach(), non_blocking=True)
        if values.is_cuda:
            self._devices.add(values.device)
        return box

    def wait(self) -> None:
        """Return when every copy has arrived."""
        for device in self._devices:
            torch.cuda.synchronize(device)
        self._devices.clear()

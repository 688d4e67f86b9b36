"""Beginning a run with weights of another model: each rank fills the elements that it owns, at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ldmscale.checkpoint.shards import Reader
from ldmscale.errors import CheckpointError
from ldmscale.train.engine.engine import Engine


class Weights(Protocol):
    """Whole tensors by parameter name, of which ranges can be had."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def fill(self, name: str, offset: int, out: Tensor) -> None:
        """Copy elements [offset, offset + out.numel()) of the flattened tensor into the 1-D tensor `out`."""
        ...


class SavedWeights:
    """Of a network in one of our checkpoints: the trained ones of one kind, the frozen ones, the buffers.

    Only the ranges that are asked for are read.
    """

    def __init__(self, reader: Reader, network: str, kind: str) -> None:
        self._reader = reader
        self._keys = {
            name: f"{network}/{part}/{name}"
            for part in (kind, "frozen", "buffer")
            for name in reader.names(network, part)
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._reader.entry(key).shape for name, key in self._keys.items()}

    def fill(self, name: str, offset: int, out: Tensor) -> None:
        self._reader.fill(self._keys[name], offset, out)


class WholeWeights:
    """Of a state dict in host memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def fill(self, name: str, offset: int, out: Tensor) -> None:
        out.copy_(self._tensors[name].reshape(-1)[offset : offset + out.numel()])


@torch.no_grad()
def warm_start(engine: Engine, weights: Weights, origin: str) -> None:
    """Give a network that has not been trained yet other weights. Collective under ZeRO.

    Raises CheckpointError, before anything is changed, naming what does not fit. Averages must start anew after it.
    """
    found = weights.shapes()
    wanted = engine.shapes()
    wanted |= {name: tuple(buffer.shape) for name, buffer in engine.buffers()}
    faults = [f"{name} is missing there" for name in sorted(wanted.keys() - found.keys())]
    faults += [f"{name} is not in this model" for name in sorted(found.keys() - wanted.keys())]
    faults += [
        f"{name} has shape {list(found[name])}, this model's has {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if faults:
        raise CheckpointError(
            f"the weights of {engine.name} in {origin} do not fit this model; give the network's settings of there:\n"
            + "\n".join(faults[:20])
            + (f"\n... and {len(faults) - 20} more" if len(faults) > 20 else "")
        )
    for fragment in engine.fragments():
        weights.fill(fragment.name, fragment.offset, fragment.of(engine.masters[fragment.flat]))
    for fragment, values in engine.frozen_fragments():
        weights.fill(fragment.name, fragment.offset, values)
    for name, buffer in engine.buffers():
        values = torch.empty(buffer.numel(), dtype=buffer.dtype)
        weights.fill(name, 0, values)
        buffer.copy_(values.view_as(buffer))
    engine.layout.sync_params_from_master()

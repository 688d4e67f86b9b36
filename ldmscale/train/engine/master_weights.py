"""Where the fp32 master weights of a network lie on this rank, whatever the ZeRO stage.

A ZeRO optimiser keeps the fp32 weights that it steps on as flat tensors, cut in a way that depends on the
stage and on the number of ranks. Everything that needs "the weights" in fp32 (the moving average,
checkpoints) works on these flat tensors and on the list of fragments that says which elements of which
parameter lie where; nothing here gathers a whole parameter.

The cuts, as of DeepSpeed 0.19:

- ZeRO-3: rank r of W holds elements [r*c, min((r+1)*c, n)) of each flattened parameter of n elements, c =
  ceil(n / W). The last ranks may hold nothing, and the padding is uninitialised memory.
- ZeRO-1 and 2: the concatenation of all parameters is cut into W equal parts.
- no ZeRO: everything is on every rank, behind one another with gaps (replicated.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ldmscale.train.engine import deepspeed_internals as internals


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + numel) of one flattened parameter, without padding."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    offset: int
    numel: int
    flat: int  # which of `ShardLayout.masters` holds them
    start: int = 0  # where in that flat tensor they begin
    replicated: bool = False  # every rank holds the same elements

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's elements of a tensor laid out like its master, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class ShardLayout:
    """The masters on this rank, what they hold, and how a change of them reaches the forward pass."""

    masters: list[Tensor]  # fp32; the very tensors that the optimiser steps on
    fragments: list[Fragment]
    # Collective under ZeRO: forward weights := masters, also the ones kept whole on all ranks.
    sync_params_from_master: Callable[[], None]


def layout_of(network: nn.Module, optimizer: Any) -> ShardLayout:
    """The layout of a network behind the DeepSpeed optimizer that trains it. `ReplicatedEngine` makes its own."""
    ranges = zero3_fragments if internals.shards_parameters(optimizer) else partitioned_fragments
    return ShardLayout(
        internals.masters(optimizer),
        list(ranges(network, optimizer)),
        partial(internals.sync_params_from_master, optimizer),
    )


def zero3_fragments(network: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    """ZeRO-3."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for flat, parameters in enumerate(internals.zero3_groups(optimizer)):
        start = 0
        for parameter in parameters:
            offset, numel = internals.zero3_range(optimizer, parameter)
            shape = internals.whole_shape(parameter)
            yield Fragment(names[id(parameter)], shape, offset, numel, flat, start)
            start += internals.zero3_shard_numel(parameter)


def partitioned_fragments(network: nn.Module, _: Any) -> Iterator[Fragment]:
    """ZeRO-1 and ZeRO-2, and DeepSpeed's optimizer for bf16 weights with fp32 gradients at stage 1."""
    for name, parameter in network.named_parameters():
        found = internals.master_range(parameter)
        if found is not None:
            yield Fragment(name, tuple(parameter.shape), found.offset, found.numel, found.flat, found.start)

"""Where the fp32 master weights of a network lie on this rank, whatever the ZeRO stage.

A ZeRO optimiser keeps the fp32 weights that it steps on as flat tensors, cut in a way that depends on the
stage and on the number of ranks. Everything that needs "the weights" in fp32 (the moving average,
checkpoints) works on these flat tensors and on the list of fragments that says which elements of which
parameter lie where; nothing here gathers a whole parameter.

The cuts, as of DeepSpeed 0.19:

- ZeRO-3: rank r of W holds elements [r*c, min((r+1)*c, n)) of each flattened parameter of n elements, c =
  ceil(n / W). The last ranks may hold nothing, and the padding is uninitialised memory.
- ZeRO-1 and 2: the concatenation of all parameters is cut into W equal parts; `_hp_mapping` says what of a
  parameter is here.
- no ZeRO: everything is on every rank, behind one another with gaps (replicated.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + numel) of one flattened parameter, without padding."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    offset: int
    numel: int
    flat: int  # which of `Layout.masters` holds them
    start: int = 0  # where in that flat tensor they begin
    replicated: bool = False  # every rank holds the same elements

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's elements of a tensor laid out like its master, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class Layout:
    """The masters on this rank, what they hold, and how the forward pass gets to see a change of them."""

    masters: list[Tensor]  # fp32; the very tensors that the optimiser steps on
    fragments: list[Fragment]
    publish: Callable[
        [], None
    ]  # collective under ZeRO: forward weights := masters, also the ones kept whole on all ranks


def layout_of(network: nn.Module, optimizer: Any) -> Layout:
    """The layout of a network behind the DeepSpeed optimiser that trains it. `Replicated` knows its own."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _sharded_parameters(network, optimizer)
    return _sharded_states(network, optimizer)


def _names(network: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in network.named_parameters()}


def zero3_range(optimizer: Any, parameter: Any) -> tuple[int, int]:
    """Offset and number of the elements of a ZeRO-3 parameter that live on this rank."""
    size = parameter.partition_numel()
    offset = min(size * optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
    return offset, min(size, parameter.ds_numel - offset)


def _sharded_parameters(network: nn.Module, optimizer: Any) -> Layout:
    """ZeRO-3."""
    names = _names(network)
    masters: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)
    fragments = []
    for index, parameters in enumerate(optimizer.fp16_groups):
        start = 0
        for parameter in parameters:
            offset, numel = zero3_range(optimizer, parameter)
            shape = tuple(parameter.ds_shape)
            fragments.append(Fragment(names[id(parameter)], shape, offset, numel, index, start))
            start += parameter.partition_numel()

    def publish() -> None:
        # Drop the gathered copies first: small parameters stay gathered, and would hide the new values until
        # the next step.
        optimizer.checkpoint_event_prologue()
        for index in range(len(masters)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()

    return Layout(masters, fragments, publish)


def _sharded_states(network: nn.Module, optimizer: Any) -> Layout:
    """ZeRO-1 and ZeRO-2, and DeepSpeed's optimiser for bf16 weights with fp32 gradients at stage 1."""
    masters = (
        getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    )
    fragments = []
    for name, parameter in network.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:  # None: no element of it lives on this rank
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            shape = tuple(parameter.shape)
            fragments.append(
                Fragment(name, shape, low.start, low.numel, mapping.param_group_index, high.start)
            )

    def publish() -> None:
        optimizer.update_lp_params()

    return Layout(list(masters), fragments, publish)

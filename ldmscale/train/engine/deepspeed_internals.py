"""Private and undocumented state of DeepSpeed 0.19. No other file of ldmscale reads or writes it (tests/test_layout.py).

tests/train/engine/test_deepspeed_internals.py runs every function on real engines of ZeRO-1, 2 and 3. A version of
DeepSpeed that renames a field or changes its meaning fails there, and is adapted to here. DeepSpeed has no types:
`Any` is its engine, its ZeRO optimizer or, at ZeRO-3, a parameter with DeepSpeed's attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# ---- engine


def counters(engine: Any) -> tuple[int, int, int]:
    """Micro-batches, accumulation windows, and windows without an update since the start. A dry run restores them."""
    return engine.micro_steps, engine.global_steps, engine.skipped_steps


def set_counters(engine: Any, micro_batches: int, windows: int, skipped_windows: int) -> None:
    """Sets the counters: DeepSpeed finds the end of an accumulation window by them, and load_checkpoint() is not used."""
    engine.micro_steps, engine.global_steps, engine.skipped_steps = micro_batches, windows, skipped_windows
    engine.global_samples = (
        windows * engine.train_batch_size()
    )  # as DeepSpeed's own load_checkpoint() derives it


def count_windows_again(engine: Any) -> None:
    """Ends set_gradient_accumulation_boundary(True): the public method has no value for "by the counters"."""
    engine._is_gradient_accumulation_boundary = None


def skip_shared_memory_extension() -> None:
    """Keeps DeepSpeed's CPU backend from compiling its shared-memory collectives. No option of it does that."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# ---- parameters; all three also accept a parameter that DeepSpeed does not shard


def shard(parameter: nn.Parameter) -> Tensor | None:
    """This rank's elements of a ZeRO-3 parameter with padding, 1-D; None if the parameter is whole. Frozen ones are saved so."""
    found: Tensor | None = getattr(parameter, "ds_tensor", None)
    return found


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter: outside its module a ZeRO-3 parameter has shape [0]."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, without padding."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


# ---- ZeRO optimizers: where the fp32 masters lie


class MasterRange(NamedTuple):
    """Elements [offset, offset + numel) of a flattened parameter, at `start` of master number `flat`."""

    offset: int
    numel: int
    flat: int
    start: int


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps on the masters. Its moments are saved, and its learning rate is set, directly."""
    found: torch.optim.Optimizer = optimizer.optimizer
    return found


def shards_parameters(optimizer: Any) -> bool:
    """Whether this is the optimizer of ZeRO-3. The class is not public, its flat shards identify it."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def masters(optimizer: Any) -> list[Tensor]:
    """The flat fp32 tensors on this rank that the base optimizer steps on: averages and checkpoints work on them.

    Three optimizers have three names for them: ZeRO-3, ZeRO-1 and 2, and the one for bf16 at ZeRO-1.
    """
    if shards_parameters(optimizer):
        return list(optimizer.fp32_partitioned_groups_flat)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(optimizer.single_partition_of_fp32_groups)
    return list(optimizer.fp32_groups_flat_partition)


def zero3_groups(optimizer: Any) -> Sequence[Sequence[nn.Parameter]]:
    """The parameters of each master, in the order in which they lie in it, whatever the dtype."""
    groups: Sequence[Sequence[nn.Parameter]] = optimizer.fp16_groups
    return groups


def zero3_shard_numel(parameter: Any) -> int:
    """Elements of a ZeRO-3 shard with padding, the same on all ranks: the distance of parameters in a master."""
    return int(parameter.partition_numel())


def zero3_range(optimizer: Any, parameter: Any) -> tuple[int, int]:
    """Offset and number, without padding, of the elements of a ZeRO-3 parameter (or a frozen one) on this rank."""
    size = zero3_shard_numel(parameter)
    # With secondary shards a parameter is cut over fewer ranks than the world has.
    offset = min(size * optimizer._get_param_partition_rank(parameter), whole_numel(parameter))
    return offset, min(size, whole_numel(parameter) - offset)


def master_range(parameter: Any) -> MasterRange | None:
    """ZeRO-1 and 2: what of a parameter lies in this rank's masters; None: no element of it."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return MasterRange(low.start, low.numel, mapping.param_group_index, high.start)


def sync_params_from_master(optimizer: Any) -> None:
    """Copies the masters to the weights of the forward pass. Collective.

    DeepSpeed does it inside step() and load_checkpoint() only.
    """
    if not shards_parameters(optimizer):
        optimizer.update_lp_params()
        return
    # Small parameters stay gathered, and would hide the new values until the next step: they are released first.
    optimizer.checkpoint_event_prologue()
    for index in range(len(masters(optimizer))):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()


# ---- ZeRO optimizers: gradients between the last backward of a window and its step


def gradient_shards(optimizer: Any) -> list[Tensor]:
    """The reduced gradients on this rank, in the order of the masters. Empty for bf16 at ZeRO-1."""
    groups = getattr(optimizer, "averaged_gradients", {}).values()
    return [part for parts in groups for part in parts or ()]


def whole_gradients(optimizer: Any) -> list[Tensor]:
    """bf16 at ZeRO-1: the reduced fp32 gradients of all parameters with padding, the same on every rank. Else empty."""
    return list(getattr(optimizer, "fp32_groups_gradients_flat", []))


def discard_gradients(optimizer: Any) -> None:
    """Drops the gradients of a window that does not end, on this rank alone, as DeepSpeed does after an overflow.

    DeepSpeed's step() does it for a window that ends. It is collective, and so no way out for a rank that failed.
    At ZeRO-3 the parameters that the failed pass gathered are released.
    """
    zero3 = shards_parameters(optimizer)
    if zero3:
        for parameter in chain.from_iterable(zero3_groups(optimizer)):
            if parameter.grad is not None and not parameter.grad.is_cuda:
                parameter.grad = None  # zero_grad() of ZeRO-3 expects CUDA streams where there is a gradient
    optimizer.zero_grad(set_to_none=True)
    if whole_gradients(optimizer):
        return  # its zero_grad() clears the fp32 gradients too
    if zero3:
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()  # clear() would drop the buffer that all windows use
        optimizer.averaged_gradients = {}
        optimizer.empty_partition_cache()
        return
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    for index in optimizer.averaged_gradients:
        optimizer.averaged_gradients[index] = None
    for index in optimizer.all_grad_tensors:  # of the micro-batches before the last one
        optimizer.all_grad_tensors[index] = None

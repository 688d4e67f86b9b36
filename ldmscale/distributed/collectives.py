"""Small agreements between ranks: flags, numbers, lists, objects and single tensors, never a network's
weights.

Every function is collective: all ranks call it at the same point. With one rank, or before torch.distributed
is initialised, each is trivial. Values travel through host memory (a gloo group beside NCCL), so that no call
waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ldmscale.errors import ConfigError, LdmscaleError
from ldmscale.waiting import announced

T = TypeVar("T")

# What a rank logs that waits in a collective. It cannot leave alone: each of the ranks that it waits for obeys a stop
# request by itself, and the timeout of the group is the limit.
_OTHERS = "other ranks, which have not come to this exchange; their logs say what they do, `ldmscale doctor run.dir=` compares them"
_MAIN = "rank 0, which prepares what all ranks need (for instance the index of the shards); its log says more"

# The gloo group beside an NCCL world, and the world it was made for (a process may leave one world and join
# another).
_side: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


def barrier() -> None:
    """Return when all ranks have come here."""
    if _alone():
        return
    with announced(_OTHERS):
        dist.barrier(group=_host_group())


def any_true(flag: bool) -> bool:
    """True on all ranks if `flag` is true on any."""
    return max_over_ranks(float(flag)) > 0


def any_true_of(*flags: bool) -> list[bool]:
    """Of each flag, whether it is true on any rank; one exchange for all of them."""
    if _alone():
        return list(flags)
    box = torch.tensor(flags, dtype=torch.float64)
    with announced(_OTHERS):
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_host_group())
    return [value > 0 for value in box.tolist()]


def sum_over_ranks(value: float) -> float:
    """Sum of `value` over ranks in double precision, the same on all; exact for whole numbers below 2**53."""
    return _reduced(value, dist.ReduceOp.SUM)


def sums_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums of several values over ranks; one exchange for all of them."""
    if _alone():
        return [float(value) for value in values]
    box = torch.tensor(values, dtype=torch.float64)
    with announced(_OTHERS):
        dist.all_reduce(box, group=_host_group())
    return [float(value) for value in box.tolist()]


def max_over_ranks(value: float) -> float:
    """Largest `value` of any rank, the same on all."""
    return _reduced(value, dist.ReduceOp.MAX)


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Mean of each value over the ranks that have its key, the same on all ranks; ranks may have different
    keys.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for key, value in gather_lists(list(values.items())):
        sums[key] = sums.get(key, 0.0) + value
        counts[key] = counts.get(key, 0) + 1
    return {key: total / counts[key] for key, total in sums.items()}


def mean_tensor_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of a floating-point tensor over ranks, the same on all; travels on the tensor's own device."""
    if _alone():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sum_tensor_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of a tensor over ranks, the same on all and a new one; travels on the tensor's own device."""
    total = tensor.detach().clone()
    if not _alone():
        dist.all_reduce(total)
    return total


def gather_lists(items: Sequence[T]) -> list[T]:
    """The items of all ranks in the order of ranks, on every rank. Items must pickle and be small."""
    if _alone():
        return list(items)
    gathered: list[Any] = [None] * dist.get_world_size()
    with announced(_OTHERS):
        dist.all_gather_object(gathered, list(items), group=_host_group())
    return [item for part in gathered for item in part]


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank; what the other ranks pass is ignored.

    The value must pickle and be small.
    """
    if _alone():
        return value
    box: list[Any] = [value]
    with announced(_MAIN):
        dist.broadcast_object_list(box, src=0, group=_host_group())
    result: T = box[0]
    return result


def from_main_rank(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; the others do not run it.

    An error that a user can cause is raised on every rank, so that all end alike. The value must pickle.
    """
    outcome: tuple[T | None, LdmscaleError | None] = (None, None)
    if _alone() or dist.get_rank() == 0:
        try:
            outcome = (work(), None)
        except LdmscaleError as fault:
            outcome = (None, fault)
        except OSError as fault:
            outcome = (None, ConfigError(f"rank 0 cannot read or write what the job needs: {fault}"))
        except Exception as fault:
            # The others wait in the broadcast: they must hear of it before this rank ends.
            broadcast_object((None, LdmscaleError(f"rank 0 failed: {fault!r}")))
            raise
    value, error = broadcast_object(outcome)
    if error is not None:
        raise error.for_all_ranks()
    return cast(T, value)


def set_collective_timeout(seconds: float) -> None:
    """How long every later collective of every group may take before it fails on the ranks that wait.

    A group's first timeout must cover compiling, fetching and allocating; afterwards a hang should show soon.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    _host_group()  # so that it exists and gets its timeout, too
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _alone() -> bool:
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def _reduced(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    if _alone():
        return float(value)
    box = torch.tensor([value], dtype=torch.float64)
    with announced(_OTHERS):
        dist.all_reduce(box, op=operation, group=_host_group())
    return float(box.item())


def _host_group() -> dist.ProcessGroup | None:
    """A group that carries host tensors; None (the world itself) under gloo.

    Made at the first collective call.
    """
    global _side
    if dist.get_backend() == "gloo":
        return None
    world = dist.group.WORLD
    assert world is not None
    if _side is None or _side[0] is not world:
        group = dist.new_group(backend="gloo")
        _side = (world, group)
    return _side[1]

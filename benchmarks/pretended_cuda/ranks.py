"""A process group of pretended ranks: collectives return at once with what they were given, and are counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

_OF_TENSORS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
HOST_GROUP = "host group"  # takes the place of the gloo group that carries host tensors


class _Done:
    """The handle of a collective."""

    def wait(self, *_: Any, **__: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class PretendedRanks:
    """Rank 0 of `world` ranks that do not exist. One per process; it stays until the process ends.

    Attributes:
        calls: collectives per name since `reset`, without those of the host group.
        elements: elements of their largest tensor, per name.
        host_calls: collectives of the host group per name.
        host_tensors: "name shape" of CPU tensors given to the default group, which NCCL would refuse.
    """

    def __init__(self, world: int, *, on_device: bool) -> None:
        self.world, self.on_device = world, on_device
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        self.host_calls: Counter[str] = Counter()
        self.host_tensors: list[str] = []
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        for name in _OF_TENSORS:
            setattr(dist, name, self._collective(name))

        real_group = dist.new_group

        def new_group(*args: Any, **options: Any) -> Any:
            return HOST_GROUP if options.get("backend") == "gloo" else real_group(*args, **options)

        def all_gather_object(out: list[Any], value: Any, group: Any = None) -> None:
            self.host_calls["all_gather_object"] += 1
            out[:] = [value] * len(out)

        def broadcast_object_list(
            box: list[Any], src: int = 0, group: Any = None, device: Any = None
        ) -> None:
            self.host_calls["broadcast_object_list"] += 1

        for name, replacement in (
            ("new_group", new_group),
            ("all_gather_object", all_gather_object),
            ("broadcast_object_list", broadcast_object_list),
        ):
            setattr(dist, name, replacement)

    def reset(self) -> None:
        for counter in (self.calls, self.elements, self.host_calls):
            counter.clear()
        self.host_tensors.clear()

    def _collective(self, name: str) -> Any:
        def collective(*args: Any, **options: Any) -> _Done:
            tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
            if HOST_GROUP in [x for x in (*args, *options.values()) if isinstance(x, str)]:
                self.host_calls[name] += 1
                return _Done()
            self.calls[name] += 1
            self.elements[name] += max((x.numel() for x in tensors), default=0)
            for tensor in tensors:
                if self.on_device and tensor.device.type != "cuda":
                    self.host_tensors.append(f"{name} {tuple(tensor.shape)}")
                elif not self.on_device and name == "all_gather_into_tensor":
                    tensors[0].zero_()  # otherwise uninitialised memory, whose values may be NaN
            return _Done()

        return collective

"""The device and the process group of this rank: NCCL between GPUs, gloo otherwise."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ldmscale.distributed.devices import choose_device, use_device
from ldmscale.distributed.environment import Ranks, export_rendezvous, read_ranks
from ldmscale.distributed.muster import gather_at_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among the others, with its device and the backend that moves tensors between ranks."""

    ranks: Ranks
    device: torch.device
    backend: str

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """How many processes the job has."""
        return self.ranks.size

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.ranks.is_main


def choose_backend(device: torch.device) -> str:
    """The torch.distributed backend for tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def open_world(ranks: Ranks | None = None, *, timeout_minutes: float = 30.0) -> World:
    """Choose the device and, if there are several ranks, join the process group. Collective.

    A group that already exists is used as it is. A single rank gets no group: what needs one even then
    (DeepSpeed) makes it. Raises ConfigError if the ranks or the rendezvous are not known, and as `choose_device`.
    Ranks that are missing are named in the log after 10 s; see `gather_at_store`.
    """
    ranks = ranks or read_ranks()
    device = choose_device(ranks)
    world = World(ranks, device, choose_backend(device))
    use_device(device)
    if ranks.size > 1 and not dist.is_initialized():
        export_rendezvous(ranks)
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group(
            world.backend,
            store=gather_at_store(ranks, timeout=timeout),
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        log.debug("joined %d ranks by %s on %s", ranks.size, world.backend, device)
    return world


def close_world() -> None:
    """Leave the process group if there is one, so that the process ends without complaints of its threads."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

"""The device and the process group of this rank: NCCL between GPUs, gloo otherwise."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ldmscale.distributed.environment import Ranks, export_rendezvous, in_slurm_step, read_ranks
from ldmscale.distributed.muster import gather_at_store
from ldmscale.errors import ConfigError

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


def choose_device(ranks: Ranks, env: Mapping[str, str] = os.environ) -> torch.device:
    """GPU number `local_rank`, or the CPU where there is no GPU or DS_ACCELERATOR=cpu asks for it.

    A Slurm task that sees one GPU of its own (--gpus-per-task=1) takes that one.
    Raises ConfigError if this node has more ranks than GPUs.
    """
    if env.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if ranks.local_size <= visible:
        return torch.device("cuda", ranks.local_rank)
    if visible == 1 and in_slurm_step(env):
        return torch.device("cuda", 0)
    # Every rank of the node says so, not only those for which no GPU is left: the others would wait for them.
    raise ConfigError(
        f"This node has {ranks.local_size} ranks and shows {visible} GPU(s): start at most {visible} ranks a "
        "node, or set DS_ACCELERATOR=cpu to train on the CPU."
    )


def choose_backend(device: torch.device) -> str:
    """The torch.distributed backend for tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def open_world(ranks: Ranks | None = None, *, timeout_minutes: float = 30.0) -> World:
    """Choose the device and, if there are several ranks, join the process group. Collective.

    A group that already exists is used as it is. A single rank gets no group: what needs one even then
    (DeepSpeed) makes it. Raises ConfigError if the ranks or the rendezvous are not known, or if there are too
    few GPUs. Ranks that are missing are named in the log after 10 s; see `gather_at_store`.
    """
    ranks = ranks or read_ranks()
    device = choose_device(ranks)
    world = World(ranks, device, choose_backend(device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
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

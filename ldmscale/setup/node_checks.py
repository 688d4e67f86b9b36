"""What this node must offer before ranks join and loading processes start; what lacks is named with its remedy."""

from __future__ import annotations

import math
import os
import socket

from ldmscale.data.loading.draws import BatchDraws
from ldmscale.data.loading.loader import MakeItem
from ldmscale.data.loading.node_limits import descriptor_faults, shared_memory_faults, socket_faults
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.data.loading.workers import PREFETCH
from ldmscale.distributed.collectives import gather_lists
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import ConfigError


def usable_workers(workers: int) -> int:
    """Loading processes of a rank: as configured, at most one for each core that this process may use.

    The order of samples does not depend on it.
    """
    return min(workers, len(os.sched_getaffinity(0)))


def check_processes(ranks: Ranks, workers: int) -> None:
    """Raise the limit on open files; ConfigError where it, or the temporary folder, does not suit ranks and workers.

    Before a process group or a loading process is made: without descriptors both hang.
    """
    faults = descriptor_faults(workers=workers, prefetch=PREFETCH, ranks=ranks.size) + socket_faults(
        workers=workers
    )
    if faults:
        raise ConfigError(faults, shared=ranks.local_rank > 0)  # one message a node


def check_shared_memory(
    ranks: Ranks,
    make_item: MakeItem,
    draws: BatchDraws | None = None,
    *,
    batch: int,
    workers: int,
    prefetch: int = PREFETCH,
) -> None:
    """ConfigError, on all ranks, where the batches in flight do not fit into the shared memory of a node. Collective."""
    faults = shared_memory_faults(
        batch * bytes_of_sample(make_item, draws),
        workers=workers,
        prefetch=prefetch,
        local_ranks=ranks.local_size,
    )
    if found := gather_lists(
        [f"{socket.gethostname()}: {fault}" for fault in faults if ranks.local_rank == 0]
    ):
        raise ConfigError(found)


def bytes_of_sample(make_item: MakeItem, draws: BatchDraws | None = None) -> int:
    """Bytes of the arrays that a loading process hands over for one sample: images or latents, and other large arrays."""
    if isinstance(make_item, LatentItem):
        form, text = make_item.format, make_item.text
        values = max(math.prod(form.stored_shape_of(bucket)) for bucket in range(form.buckets))
        places = max(math.prod(form.shape_of(bucket)[1:]) for bucket in range(form.buckets))
        stored = values * form.stored_type.itemsize + (0 if text is None else text.stored_bytes)
        return stored + (0 if draws is None else draws.bytes_of_sample(places))
    if not isinstance(make_item, ImageItem):
        return 0
    largest = max(math.prod(make_item.shape(bucket)) for bucket in range(max(1, len(make_item.shapes))))
    given = make_item.embeddings
    if draws is not None:
        largest += draws.bytes_of_sample(largest // 3 // draws.factor**2)
    return largest + (0 if given is None else 4 * given.max_tokens * given.width)

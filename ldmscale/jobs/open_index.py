"""Opening the index of shards on all ranks: made where it is missing, once for each place that holds one."""

from __future__ import annotations

from collections.abc import Sequence

from ldmscale.data.index import ShardIndex
from ldmscale.distributed.collectives import barrier, from_main_rank
from ldmscale.distributed.environment import Ranks


def open_index(shards: Sequence[str], ranks: Ranks) -> ShardIndex:
    """The index, on every rank. Collective.

    Rank 0 looks through shards that have no index yet. The index of remote or read-only shards is in a cache folder,
    which another node may not share: there the node's first rank does it again.

    Raises DataError, on all ranks, for shards that are missing or have changed.
    """
    from_main_rank(lambda: ShardIndex.open(shards, build_missing=True).fingerprint)
    if ranks.local_rank == 0 and not ranks.is_main:
        ShardIndex.open(shards, build_missing=True)
    barrier()
    return ShardIndex.open(shards)

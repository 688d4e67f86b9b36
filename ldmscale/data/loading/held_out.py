"""Fixed samples, each once and in its own shape: what a run is measured on, and what its previews are made of.

Samples are numbered bucket by bucket; without aspect-ratio buckets in the order of seed 0. A sample's number is its
position, from which its draws follow. A micro-batch is of one bucket, so that its arrays have one shape.
"""

from __future__ import annotations

from collections.abc import Sequence as Values

import numpy as np

from ldmscale.data.loading.fetch import Fetcher, Run
from ldmscale.data.loading.loader import Batch, MakeItem, MicroBatches
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.order.sequence import Sequence
from ldmscale.data.shards.mixture import Mixture
from ldmscale.distributed.collectives import gather_lists
from ldmscale.errors import DataError

_LISTED = 8  # ranks whose faults are reported


def bucket_quotas(counts: Values[int], wanted: int) -> list[int]:
    """How many of `wanted` samples are of each bucket: its share of all, the largest remainders rounded up.

    Args:
        counts: samples of each bucket.
        wanted: at most all of them.
    """
    exact = np.array(counts, dtype=np.float64) * wanted / sum(counts)
    whole = np.floor(exact).astype(np.int64)
    rest = wanted - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:rest]] += 1
    return [int(count) for count in whole]


def fixed_runs(index: Mixture, wanted: int, size: int) -> list[Run]:
    """The micro-batches of at most `size` that have `wanted` samples of an index, each once; bucket by bucket."""
    runs, position = [], 0
    for bucket, count in enumerate(bucket_quotas(index.bucket_counts.sum(axis=0).tolist(), wanted)):
        runs += list(Run(position, bucket, 0, count).parts(size)) if count else []
        position += count
    return runs


def fixed_batches(index: Mixture, make_item: MakeItem, wanted: int, size: int) -> list[Batch]:
    """All micro-batches of `fixed_runs`, the same on every rank and in every run."""
    return _read(index, make_item, fixed_runs(index, wanted, size))


def rank_batches(
    index: Mixture, make_item: MakeItem, wanted: int, size: int, *, rank: int, world: int
) -> list[Batch]:
    """This rank's micro-batches of `fixed_runs`. Every rank has as many: one without repeats the first. Collective.

    Positions from `wanted` on are those of such a repetition, which does not count.

    Raises:
        DataError: on all ranks alike (`shared`), if one of them cannot read its own.
    """
    runs = fixed_runs(index, wanted, size)
    mine = runs[rank::world]
    if len(mine) < -(-len(runs) // world):
        mine = [*mine, runs[0]._replace(position=wanted)]
    batches, faults = [], []
    try:
        batches = _read(index, make_item, mine)
    except DataError as error:
        faults = [f"rank {rank}: {error}"]
    if found := gather_lists(faults):
        raise DataError(found[:_LISTED], shared=True)
    return batches


def _read(index: Mixture, make_item: MakeItem, runs: Values[Run]) -> list[Batch]:
    sequence = Sequence(index, seed=0)
    read = MicroBatches(Fetcher(index, sequence, make_item, seed=0, ledger=Ledger(None, 0)))
    return [read.batch(run) for run in runs]

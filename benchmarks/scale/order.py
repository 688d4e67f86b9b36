"""The order of samples at the size of LAION: what a batch costs one loading worker, and whether every sample comes once."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from benchmarks.scale.memory import resident_mib
from ldmscale.data.loading.stream import rank_positions
from ldmscale.data.order.shuffle import Order

SAMPLES_PER_SHARD = 10_000


@dataclass(frozen=True)
class Ordered:
    shards: int
    samples: int
    block_shards: int
    ranks: int
    made_seconds: float
    first_batch_ms: float  # with the permutation of the epoch's shards
    batch_ms: float  # mean, with the blocks that a worker comes upon
    batches_per_block: float  # steps of all ranks that read one block
    memory_mib: float
    block_is_covered: bool  # the positions of one block name each of its samples once
    ranks_are_disjoint: bool  # the positions of 3 steps of all ranks are each there once
    shards_at_once: int  # that all ranks read at a time


def measure(
    shards: int,
    *,
    block_shards: int = 16,
    ranks: int = 1024,
    workers: int = 8,
    micro_batch: int = 8,
    batches: int = 60,
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> Ordered:
    """The batches of one worker of a rank in the middle, a third into the first epoch."""
    spread = max(1, samples_per_shard // 10)
    counts = np.random.default_rng(0).integers(samples_per_shard - spread, samples_per_shard + spread, shards)
    before = resident_mib()
    begin = time.perf_counter()
    order = Order(counts, 0, block_shards)
    made = time.perf_counter() - begin
    step = ranks * micro_batch
    start = order.total // 3 // step * step
    begin = time.perf_counter()
    _samples(order, start, micro_batch)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for number in range(batches):
        _samples(order, start + number * workers * step + ranks // 2 * micro_batch, micro_batch)
    spent = time.perf_counter() - begin
    named, at_once = _first_block(order, counts, block_shards)
    positions = np.concatenate(
        [
            np.array(rank_positions(0, number, rank=rank, world=ranks, global_batch=step))
            for number in range(3)
            for rank in range(ranks)
        ]
    )
    return Ordered(
        shards=shards,
        samples=int(order.total),
        block_shards=block_shards,
        ranks=ranks,
        made_seconds=made,
        first_batch_ms=1e3 * first,
        batch_ms=1e3 * spent / batches,
        batches_per_block=block_shards * samples_per_shard / step,
        memory_mib=resident_mib() - before,
        block_is_covered=named,
        ranks_are_disjoint=bool((np.sort(positions) == np.arange(3 * step)).all()),
        shards_at_once=at_once,
    )


def _samples(order: Order, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Shards and indices of `count` positions; one by one where they cross the end of a block."""
    found = order.samples_at(position, count)
    if found is not None:
        return found
    single = [order.sample_at(p) for p in range(position, position + count)]
    return np.array([shard for _, shard, _ in single]), np.array([index for _, _, index in single])


def _first_block(order: Order, counts: np.ndarray, block_shards: int) -> tuple[bool, int]:
    """Whether the epoch's first block names each sample of its shards once, and the number of those shards."""
    shards, indices = [], []
    position, count = 0, 4096
    while True:
        found = order.samples_at(position, count)
        if found is None:  # the block ends within these
            count //= 2
            continue
        shards.append(found[0])
        indices.append(found[1])
        position += count
        if count < 4096 and order.samples_at(position - 1, 2) is None:
            break
    shard, index = np.concatenate(shards), np.concatenate(indices)
    held = np.unique(shard)
    named = shard * (int(counts.max()) + 1) + index
    whole = len(np.unique(named)) == len(named) == int(counts[held].sum())
    return whole and len(held) == block_shards, len(held)

"""The order of samples: a pure function of (counts, seed, position).

Each epoch shuffles the shards, cuts the shuffled list into blocks, and shuffles the samples inside each
block. Reads stay within a block's shards at any time, and epochs run into each other: position // total is
the epoch. Nothing depends on ranks, workers or batch sizes, so the whole state of the data is one number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldmscale.distributed.rng import shuffled
from ldmscale.errors import ConfigError, DataError

# A rank with several workers touches at most a few neighbouring blocks at a time.
_KEPT_BLOCKS = 4


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray  # permuted shard numbers [shards]
    ends: np.ndarray  # samples up to and including each of them [shards]


@dataclass(frozen=True)
class _Block:
    start: int  # offset of the block's first sample in the epoch
    shard: np.ndarray  # shard number of each sample of the block, in order [samples]
    index: np.ndarray  # index in its shard of each of them [samples]


class Order:
    """Where the sample at each position of the endless sequence lies.

    Args:
        counts: samples in each shard.
        seed: the run's seed.
        block_shards: shards whose samples are shuffled together. Larger blocks shuffle better and keep more
            shards open; 16 shards of 10,000 samples are 160,000 samples to draw from.
        name: tells the orders of several sets apart, which would be shuffled alike otherwise.

    Raises:
        DataError: if there is no sample at all.
        ConfigError: if block_shards is not at least 1.
    """

    def __init__(
        self, counts: Sequence[int] | np.ndarray, seed: int, block_shards: int = 16, name: str = ""
    ) -> None:
        self._purposes = (f"order of shards{name}", f"order of samples{name}")
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed = seed
        self.block_shards = block_shards
        self.total = int(self.counts.sum())
        if block_shards < 1:
            raise ConfigError(f"data.shuffle_block_shards must be at least 1, got {block_shards}")
        if self.total == 0:
            raise DataError(
                "the shards hold no sample; look at what `ldmscale index data.shards=...` says of them"
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._ends = np.cumsum(self.counts)

    def sample_at(self, position: int) -> tuple[int, int, int]:
        """Returns (epoch, shard, index in the shard) of the sample at `position`. O(1) for neighbouring
        positions.

        Raises:
            ValueError: if the position is negative.
        """
        if position < 0:
            raise ValueError(f"position must be at least 0, got {position}")
        epoch, offset = divmod(position, self.total)
        block = self._block_at(epoch, offset)
        return epoch, int(block.shard[offset - block.start]), int(block.index[offset - block.start])

    def samples_at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Shards and indices, int64 [count] each, of the samples from `position` on, where they lie in one block."""
        epoch, offset = divmod(position, self.total)
        block = self._block_at(epoch, offset)
        at = slice(offset - block.start, offset - block.start + count)
        if at.stop > len(block.index):
            return None
        return block.shard[at].astype(np.int64), block.index[at].astype(np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        """Returns (shard, index in the shard) of sample `number` in the shards' own order, unshuffled."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self.counts[shard])

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs.get(epoch)
        if known is None:
            shards = shuffled(len(self.counts), self.seed, epoch, self._purposes[0])
            known = self._epochs[epoch] = _Epoch(shards, np.cumsum(self.counts[shards]))
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return known

    def _block_at(self, epoch: int, offset: int) -> _Block:
        for (block_epoch, _), block in reversed(self._blocks.items()):
            if block_epoch == epoch and block.start <= offset < block.start + len(block.index):
                return block
        plan = self._epoch(epoch)
        number = int(np.searchsorted(plan.ends, offset, side="right")) // self.block_shards
        first = number * self.block_shards
        shards = plan.shards[first : first + self.block_shards]
        counts = self.counts[shards]
        start = int(plan.ends[first] - counts[0])
        shard = np.repeat(shards, counts)
        index = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        # The block's number in the whole history numbers its draw: no two blocks share one.
        blocks_per_epoch = -(-len(self.counts) // self.block_shards)
        mixed = shuffled(len(index), self.seed, epoch * blocks_per_epoch + number, self._purposes[1])
        block = _Block(start, shard[mixed].astype(np.int32), index[mixed].astype(np.int32))
        self._blocks[epoch, number] = block
        while len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return block

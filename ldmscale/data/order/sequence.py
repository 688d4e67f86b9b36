"""The endless sequence of samples of a run: sets in their proportions, buckets apart, each set at its own pace.

Within a bucket the n-th sample is a pure function of (seed, n). A mixture goes by cycles of 10,000 samples: in each
cycle every set has its exact share, in an order that is shuffled anew. So set and place in the set follow from n
without counting, weights hold to 1/10,000, and a small set begins its next epoch while a large one is in its first.
Without buckets n is the position; with buckets `buckets.BucketCursor` says which bucket a step takes from.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ldmscale.data.order.shuffle import Order
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.mixture import Mixture
from ldmscale.distributed.rng import shuffled
from ldmscale.errors import DataError

CYCLE = 10_000  # samples; weights are rounded to one part in so many


@dataclass(frozen=True)
class Place:
    """Where a sample lies: shard number, number in the shard."""

    shard: int
    index: int


class Sequence:
    """Where each sample of the endless sequence lies.

    Args:
        index: the shards.
        seed: the run's seed.
        block_shards: shards whose samples are shuffled together.

    Attributes:
        shares: of each bucket among the samples drawn, float64 [buckets].

    Raises:
        DataError: if there is no sample.
        ConfigError: if block_shards is not at least 1.
    """

    def __init__(self, index: ShardIndex | Mixture, seed: int, block_shards: int = 16) -> None:
        mixture = Mixture.of(index)
        if mixture.total == 0:
            raise DataError(
                "the shards hold no sample; look at what `ldmscale index data.shards=...` says of them"
            )
        buckets = mixture.bucket_counts.shape[1]
        # What share of all draws is of this set and of this bucket.
        drawn = np.array(
            [
                weight * part.bucket_counts.sum(axis=0) / part.total
                for part, weight in zip(mixture.parts, mixture.weights, strict=True)
            ]
        )  # [parts, buckets]
        self.shares = drawn.sum(axis=0)
        self._lanes = [
            _Lane(mixture, bucket, drawn[:, bucket], seed, block_shards) if self.shares[bucket] > 0 else None
            for bucket in range(buckets)
        ]

    def place(self, bucket: int, number: int) -> Place:
        """Where sample `number` of a bucket lies. O(1) for neighbouring numbers."""
        return self._lane(bucket).place(number)

    def places(self, bucket: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and number in the shard of `count` samples from `first` on, int64 [count] each."""
        return self._lane(bucket).places(first, count)

    def stand_in(self, bucket: int, draw: int) -> Place:
        """The sample of a bucket that a random 64-bit number stands for, each equally likely."""
        return self._lane(bucket).nth(draw)

    def _lane(self, bucket: int) -> _Lane:
        lane = self._lanes[bucket]
        assert lane is not None
        return lane


class _Lane:
    """The samples of one bucket: one order for each set, and the pattern by which sets take turns."""

    def __init__(
        self, mixture: Mixture, bucket: int, shares: np.ndarray, seed: int, block_shards: int
    ) -> None:
        self.seed, self.bucket = seed, bucket
        self.orders: list[Order] = []
        self.first_shard: list[int] = []
        self.first_index: list[np.ndarray] = []  # number in its shard of the bucket's first sample [shards]
        several = len(mixture.parts) > 1 or mixture.bucket_counts.shape[1] > 1
        for number, part in enumerate(mixture.parts):
            if shares[number] > 0:
                name = f" {number} {bucket}" if several else ""
                self.orders.append(Order(part.bucket_counts[:, bucket], seed, block_shards, name))
                self.first_shard.append(int(mixture.first_shard[number]))
                self.first_index.append(part.bucket_counts[:, :bucket].sum(axis=1))
        self.per_cycle = _apportioned(shares[shares > 0])
        self.ends = np.cumsum([order.total for order in self.orders])
        self._cycles: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def place(self, number: int) -> Place:
        if len(self.orders) == 1:
            return self._place(0, *self.orders[0].sample_at(number)[1:])
        cycle, at = divmod(number, CYCLE)
        turns, before = self._cycle(cycle)
        which = int(turns[at])
        _, shard, index = self.orders[which].sample_at(cycle * int(self.per_cycle[which]) + int(before[at]))
        return self._place(which, shard, index)

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        together = self.orders[0].samples_at(first, count) if len(self.orders) == 1 else None
        if together is None:
            single = [self.place(number) for number in range(first, first + count)]
            return np.array([each.shard for each in single]), np.array([each.index for each in single])
        shards, indices = together
        return shards + self.first_shard[0], indices + self.first_index[0][shards]

    def nth(self, draw: int) -> Place:
        number = draw % int(self.ends[-1])
        which = int(np.searchsorted(self.ends, number, side="right"))
        order = self.orders[which]
        return self._place(which, *order.locate(number - int(self.ends[which]) + order.total))

    def _place(self, which: int, shard: int, index: int) -> Place:
        return Place(self.first_shard[which] + shard, int(self.first_index[which][shard]) + index)

    def _cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn each sample of a cycle is, and how many turns that set had in it before: two [CYCLE]."""
        known = self._cycles.get(cycle)
        if known is None:
            in_order = np.repeat(np.arange(len(self.orders)), self.per_cycle)
            turns = in_order[shuffled(CYCLE, self.seed, cycle, f"mixture {self.bucket}")]
            before = np.empty(CYCLE, dtype=np.int64)
            for which, count in enumerate(self.per_cycle):
                before[turns == which] = np.arange(count)
            known = self._cycles[cycle] = (turns, before)
            while len(self._cycles) > 4:
                self._cycles.popitem(last=False)
        return known


def _apportioned(shares: np.ndarray) -> np.ndarray:
    """Whole numbers that add up to CYCLE, in proportion to `shares`, at least 1 each: the largest rests are rounded up."""
    exact = shares / shares.sum() * CYCLE
    whole: np.ndarray = np.maximum(np.floor(exact).astype(np.int64), 1)
    rest = CYCLE - int(whole.sum())
    if rest > 0:
        whole[np.argsort(whole - exact, kind="stable")[:rest]] += 1
    for _ in range(-rest):  # many tiny sets were raised to 1
        whole[np.argmax(whole)] -= 1
    return whole

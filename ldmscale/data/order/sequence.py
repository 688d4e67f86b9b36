"""The endless sequence of samples of a run: sets in their proportions, buckets apart, each set at its own pace.

Within a bucket the n-th sample is a pure function of (seed, n). A mixture goes by cycles of 10,000 samples: in each
cycle every set has its share to 1/10,000, in an order that is shuffled anew. A set with a smaller share has a turn
in some cycles only, exactly as often as its share states. So set and place in the set follow from n without counting,
and a small set begins its next epoch while a large one is in its first.
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
        self._turns = _Turns(shares[shares > 0])
        self.ends = np.cumsum([order.total for order in self.orders])
        self._cycles: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def place(self, number: int) -> Place:
        if len(self.orders) == 1:
            return self._place(0, *self.orders[0].sample_at(number)[1:])
        cycle, at = divmod(number, CYCLE)
        turns, before = self._cycle(cycle)
        which = int(turns[at])
        _, shard, index = self.orders[which].sample_at(int(before[at]))
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
        """Whose turn each sample of a cycle is, and how many turns that set had before it: two [CYCLE]."""
        known = self._cycles.get(cycle)
        if known is None:
            first, last = self._turns.before(cycle), self._turns.before(cycle + 1)
            in_order = np.repeat(np.arange(len(self.orders)), last - first)
            turns = in_order[shuffled(CYCLE, self.seed, cycle, f"mixture {self.bucket}")]
            before = np.empty(CYCLE, dtype=np.int64)
            for which in range(len(self.orders)):
                before[turns == which] = np.arange(first[which], last[which])
            known = self._cycles[cycle] = (turns, before)
            while len(self._cycles) > 4:
                self._cycles.popitem(last=False)
        return known


class _Turns:
    """How many samples each set gives per cycle.

    Sets with at least one turn per cycle have the same number in every cycle; the largest rests are rounded up. A rarer
    set has as many turns up to the end of a cycle as its share of all samples so far, rounded down, and the largest
    set gives them up.

    Args:
        shares: of each set, all above 0.
    """

    def __init__(self, shares: np.ndarray) -> None:
        exact = shares / shares.sum() * CYCLE
        self._rare = exact < 1
        self._exact = np.where(self._rare, exact, 0.0)
        self._per_cycle: np.ndarray = np.floor(np.where(self._rare, 0.0, exact)).astype(np.int64)
        rest = CYCLE - int(self._per_cycle.sum())
        wanting = np.where(self._rare, np.inf, self._per_cycle - exact)
        common = int((~self._rare).sum())
        if common:
            self._per_cycle[np.argsort(wanting, kind="stable")[: min(rest, common)]] += 1
            self._per_cycle[np.argmax(self._per_cycle)] += max(0, rest - common)
        self._largest = int(np.argmax(exact))

    def before(self, cycle: int) -> np.ndarray:
        """Turns of each set before a cycle, int64 [sets]; they add up to cycle * CYCLE."""
        turns: np.ndarray = cycle * self._per_cycle + np.floor(cycle * self._exact).astype(np.int64)
        turns[self._largest] += cycle * CYCLE - int(turns.sum())
        return turns

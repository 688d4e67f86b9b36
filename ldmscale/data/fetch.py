"""Position to item, with a deterministic stand-in for what cannot be used.

A batch must stay full and equal on all ranks, so a sample that cannot be read or decoded is replaced by
another one. Which one is a function of (seed, position) and of the data alone: every rank, worker count and
resume finds the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ldmscale.data.index import ShardIndex
from ldmscale.data.ledger import Ledger
from ldmscale.data.order import Order
from ldmscale.data.samples import Sample, SampleReader
from ldmscale.distributed.seeds import generator
from ldmscale.errors import DataError

_STAND_INS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Fetched(Generic[T]):
    """The item of one position, and how many samples were passed over for it."""

    key: str
    item: T
    skipped: int


class Fetcher(Generic[T]):
    """Fetches the item at a position.

    Args:
        index: where the samples are.
        order: which of them stands at a position.
        make_item: makes the item of (sample, position); raises DataError for a sample that it cannot use.
        seed: the run's seed; draws the stand-ins.
        ledger: takes down what was passed over.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: Order,
        make_item: Callable[[Sample, int], T],
        *,
        seed: int,
        ledger: Ledger,
    ) -> None:
        self.reader = SampleReader(index)
        self.order = order
        self.make_item = make_item
        self.seed = seed
        self.ledger = ledger

    def fetch(self, position: int) -> Fetched[T]:
        """Fetches the item at `position`, or its stand-in.

        The stand-in keeps the position, and with it the position's noise, timestep and crop.

        Raises:
            DataError: if the sample and 16 stand-ins drawn from the whole set cannot be used.
        """
        _, shard, index = self.order.sample_at(position)
        draws = None
        reason = ""
        for skipped in range(_STAND_INS + 1):
            key = ""
            try:
                sample = self.reader.read(shard, index)
                key = sample.key
                return Fetched(key, self.make_item(sample, position), skipped)
            except DataError as error:
                reason = str(error)
            url = self.reader.index.shards[shard]
            self.ledger.record(shard=url, key=key or f"number {index}", reason=reason, position=position)
            draws = draws or generator(self.seed, position, "stand-in")
            shard, index = self.order.locate(int(draws.integers(self.order.total)))
        raise DataError(
            f"position {position}: the sample and {_STAND_INS} stand-ins drawn from the whole set cannot be "
            f"used (last: {reason}); "
            "look at the data ledger and run `ldmscale index data.check=decode data.shards=...`"
        )

"""Ticket to item, with a deterministic stand-in for what cannot be used.

A batch must stay full and equal on all ranks, so a sample that cannot be read or decoded is replaced by
another one of its bucket. Which one is a function of (seed, position) and of the data alone: every rank, worker
count and resume finds the same. A store that cannot be reached is no sample's fault, and replaced by nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import cache
from typing import Generic, NamedTuple, TypeVar

from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.order.sequence import Sequence
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.reader import Sample, SampleReader
from ldmscale.data.shards.urls import is_local
from ldmscale.distributed.rng import generator
from ldmscale.errors import DataError
from ldmscale.storage.object_store import StoreError

_AT_ONCE = 16  # requests to a store
_STAND_INS = 16

T = TypeVar("T")


class Ticket(NamedTuple):
    """What to fetch: the position in the run, which gives the draws, and the sample's number in its bucket."""

    position: int
    bucket: int
    number: int


class Run(NamedTuple):
    """Tickets that follow each other: one micro-batch of one rank."""

    position: int
    bucket: int
    number: int
    samples: int

    def parts(self, samples: int) -> Iterator[Run]:
        """The same run in runs of at most so many samples."""
        for start in range(0, self.samples, samples):
            first = self.ticket(start)
            yield Run(*first, min(samples, self.samples - start))

    def ticket(self, row: int) -> Ticket:
        return Ticket(self.position + row, self.bucket, self.number + row)


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
        sequence: which of them stands where.
        make_item: makes the item of (sample, position); raises DataError for a sample that it cannot use.
        seed: the run's seed; draws the stand-ins.
        ledger: takes down what was passed over.
    """

    def __init__(
        self,
        index: ShardIndex | Mixture,
        sequence: Sequence,
        make_item: Callable[[Sample, int], T],
        *,
        seed: int,
        ledger: Ledger,
    ) -> None:
        self.reader = SampleReader(index)
        self.sequence = sequence
        self.make_item = make_item
        self.seed = seed
        self.ledger = ledger

    def read_ahead(self, run: Run) -> list[Sample | None]:
        """The samples of a run; None where one cannot be read, which `fetch` then says.

        A decoder leaves nothing of other code in the processor's caches: several reads at once take half the time. A store
        is asked for all that it has of them together, since each answer is waited for.

        Raises:
            StoreError: if the shards' store cannot be reached.
        """
        shards, indices = self.sequence.places(run.bucket, run.number, run.samples)
        urls = self.reader.index.shards

        def read(shard: int, index: int) -> Sample | None:
            try:
                return self.reader.read(shard, index, run.bucket)
            except StoreError:
                raise
            except DataError:
                return None

        found = [
            read(shard, index)
            if is_local(urls[shard])
            else _requests(os.getpid()).submit(copy_context().run, read, shard, index)
            for shard, index in zip(shards.tolist(), indices.tolist(), strict=True)
        ]
        return [each.result() if isinstance(each, Future) else each for each in found]

    def fetch(
        self,
        ticket: Ticket,
        make_item: Callable[[Sample, int], T] | None = None,
        sample: Sample | None = None,
    ) -> Fetched[T]:
        """Fetches the item of a ticket, or its stand-in.

        `make_item` takes the place of the fetcher's own: the same item, in memory that is ready for it. `sample` is that of
        the ticket, if it was read ahead.

        The stand-in keeps the position, and with it the position's noise, timestep and crop.

        Raises:
            DataError: if the sample and 16 stand-ins drawn from its whole bucket cannot be used.
            StoreError: if the shards' store cannot be reached.
        """
        position, bucket, number = ticket
        make_item = make_item or self.make_item
        place = draws = None
        reason = ""
        for skipped in range(_STAND_INS + 1):
            key = ""
            try:
                if sample is None:
                    place = place or self.sequence.place(bucket, number)
                    sample = self.reader.read(place.shard, place.index, bucket)
                key = sample.key
                return Fetched(key, make_item(sample, position), skipped)
            except StoreError:
                raise
            except DataError as error:
                reason = str(error)
            sample, place = None, place or self.sequence.place(bucket, number)
            url = self.reader.index.shards[place.shard]
            self.ledger.record(
                shard=url, key=key or f"number {place.index}", reason=reason, position=position
            )
            draws = draws or generator(self.seed, position, "stand-in").bit_generator
            place = self.sequence.stand_in(bucket, int(draws.random_raw()))
        raise DataError(
            f"position {position}: the sample and {_STAND_INS} stand-ins drawn from the whole set cannot be "
            f"used (last: {reason}); "
            "look at the data ledger and run `ldmscale index data.check=decode data.shards=...`"
        )


@cache
def _requests(process: int) -> ThreadPoolExecutor:
    """The threads of this process that wait for stores; a fork has none of its parent's."""
    return ThreadPoolExecutor(_AT_ONCE, "requests")

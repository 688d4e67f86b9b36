"""Micro-batches of torch tensors, in an order that the number of workers cannot change.

The dataset is keyed by position and a batch sampler names the positions, so torch's DataLoader gives batches
back in the sampler's order whichever worker made them. Nothing about workers needs to be saved: the data
state is `position`, and with aspect-ratio buckets how many samples each bucket has given.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldmscale.data.images.buckets import BucketCursor
from ldmscale.data.loading.draws import BatchDraws
from ldmscale.data.loading.fetch import Fetcher, Run, Ticket
from ldmscale.data.loading.latent_batches import SKIPPED, BatchMemory, LatentReader
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.loading.stream import check_batch, rank_positions
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.data.loading.workers import PREFETCH, TURN_SECONDS, end, end_at_exit, next_of, start_of_workers
from ldmscale.data.order.sequence import Sequence as SampleSequence
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.reader import Sample
from ldmscale.data.shards.urls import is_local
from ldmscale.distributed.pinning import can_pin, pinned
from ldmscale.errors import ConfigError, DataError
from ldmscale.storage.object_store import StoreError

log = logging.getLogger(__name__)

Item = Mapping[str, "np.ndarray | str | int"]
MakeItem = Callable[[Sample, int], Item]
"""Makes the item of (sample, position). Raises DataError for a sample that cannot be used."""

Batch = dict[str, Any]

_READ_AHEAD = 16  # samples read before the first of them is decoded
_FAULT = "fault"
_UNREACHABLE = "store"


class Loader:
    """Yields micro-batches for ever.

    A batch has "position" int64 [b], "key" list[str], and what `make_item` gave: arrays stacked to tensors
    [b, ...] of their dtype, integers to int64 [b], strings as list[str].

    Args:
        index: the shards' index.
        make_item: makes the item of (sample, position); must be picklable where shards are remote.
        seed: the run's seed; gives the order.
        rank: this rank.
        world: number of ranks.
        global_batch: samples a step of all ranks and micro-batches together.
        rank_micro_batch: samples a micro-batch of one rank; global_batch / (world * rank_micro_batch) make a
            step.
        position: samples consumed by all ranks before.
        consumed: of a run with buckets, the `consumed` of the loader that stopped at `position`; None: all steps so
            far had this global batch.
        workers: loading processes; 0 loads in this one.
        ledger: takes down samples that cannot be used.
        block_shards: shards whose samples are shuffled together.
        pin_memory: give batches in page-locked memory, for copies to a GPU that do not block.
        draws: random numbers that are added to every batch.

    Raises:
        ConfigError: if the batches do not divide.
    """

    def __init__(
        self,
        index: ShardIndex | Mixture,
        make_item: MakeItem,
        *,
        seed: int,
        rank: int,
        world: int,
        global_batch: int,
        rank_micro_batch: int,
        position: int = 0,
        consumed: Sequence[int] | None = None,
        workers: int = 0,
        ledger: Ledger | None = None,
        block_shards: int = 16,
        pin_memory: bool = False,
        draws: BatchDraws | None = None,
    ) -> None:
        check_batch(rank=rank, world=world, global_batch=global_batch, position=position)
        if rank_micro_batch < 1 or (global_batch // world) % rank_micro_batch:
            raise ConfigError(
                f"train.global_batch={global_batch} on {world} ranks is {global_batch // world} samples a "
                "rank, which "
                f"train.rank_micro_batch={rank_micro_batch} does not divide"
            )
        self.index = index
        self.rank = rank
        self.accumulation = global_batch // (world * rank_micro_batch)
        self.read = 0  # samples of this rank that were read so far, replaced ones included
        self.replaced = 0  # samples of this rank that were passed over so far
        self.bad_in_a_row = 0  # samples replaced one after another, up to now
        self.wait_seconds = 0.0
        sequence = SampleSequence(index, seed, block_shards)
        self._fetcher = Fetcher(index, sequence, make_item, seed=seed, ledger=ledger or Ledger(None, rank))
        self._world, self._global_batch, self._micro = world, global_batch, rank_micro_batch
        self._shares, self._seed = sequence.shares, seed
        # Steps whose micro-batches were all handed out. Workers are ahead of it.
        self._done = self._cursor([position] if len(sequence.shares) == 1 else consumed)
        self._done.advance_to(position, global_batch)
        if self._done.position != position:
            raise ConfigError(
                f"position {position} is not what the buckets have given, {self._done.position}"
            )
        self._handed_out = 0  # micro-batches of the current step
        self._workers, self._pin_memory, self._draws = workers, pin_memory, draws
        self._iterator: Iterator[Batch] | None = None
        self._at_exit: weakref.finalize[..., Any] | None = None

    @property
    def position(self) -> int:
        """Samples consumed by all ranks in the steps whose micro-batches were all handed out."""
        return self._done.position

    @property
    def consumed(self) -> list[int]:
        """The same by bucket."""
        return list(self._done.consumed)

    def __iter__(self) -> Iterator[Batch]:
        """Goes on where the last iteration stopped: there is one sequence, however often it is asked for."""
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch = next_of(self._iterator)
        except BaseException as error:
            self.close(at_once=not isinstance(error, DataError))
            raise
        self.wait_seconds += time.perf_counter() - began
        try:
            batch = _whole(batch)
        except DataError:
            self.close()  # asked again, it reads the same samples again
            raise
        self._handed_out += 1
        if self._handed_out == self.accumulation:
            self._done.take(self._global_batch)
            self._handed_out = 0
        self._count(batch.pop(SKIPPED).tolist())
        return batch

    def close(self, *, at_once: bool = False) -> None:
        """Ends the workers, `at_once` by force. What they had prepared is made again if the loader is asked for more."""
        batches, self._iterator = self._iterator, None
        if self._at_exit is not None:
            self._at_exit.detach()
            self._at_exit = None
        end(batches, at_once=at_once)

    def _start(self) -> Iterator[Batch]:
        samples = MicroBatches(self._fetcher, self._draws)
        if (
            not self._workers
        ):  # torch's loader would do the same, with more ceremony than latents take to read
            return map(self._pinned, map(samples.__getitem__, self._micro_batches()))
        # fsspec's asynchronous stores have a thread of their own, which does not survive a fork.
        context = "forkserver" if samples.remote else "fork"
        loader: DataLoader[Batch] = DataLoader(
            samples,
            batch_size=None,  # each item is a batch
            sampler=self._micro_batches(),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory and can_pin(),
            prefetch_factor=PREFETCH,
            timeout=TURN_SECONDS,
            multiprocessing_context=context,
            worker_init_fn=start_of_workers(),
            # Draws of torch's own, from the global generator, would make the training's draws depend on the
            # loader.
            generator=torch.Generator().manual_seed(0),
        )
        before = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        self._at_exit = end_at_exit(self, iterator)
        if threading.current_thread() is threading.main_thread():
            # Torch's handler raises wherever the training happens to be when a worker dies: in a collective, say.
            # Without it the death is noticed where the worker's batch is asked for, and all ranks can be told.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return iterator

    def _micro_batches(self) -> Iterator[Run]:
        ahead, first_part = self._cursor(self._done.consumed), self._handed_out
        while True:
            start = ahead.position
            bucket, number = ahead.take(self._global_batch)
            mine = rank_positions(
                start, 0, rank=self.rank, world=self._world, global_batch=self._global_batch
            )
            for part in range(first_part, self.accumulation):
                position = mine[part * self._micro]
                yield Run(position, bucket, number + position - start, self._micro)
            first_part = 0

    def _pinned(self, batch: Batch) -> Batch:
        if not self._pin_memory:
            return batch
        return {
            name: pinned(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }

    def _cursor(self, consumed: Sequence[int] | None) -> BucketCursor:
        return BucketCursor(self._shares, self._seed, consumed)

    def _count(self, skipped: list[int]) -> None:
        if not any(skipped):
            self.read += len(skipped)
            self.bad_in_a_row = 0
            return
        for count in skipped:
            self.replaced += count
            self.bad_in_a_row = self.bad_in_a_row + 1 if count else 0
        self.read += len(skipped) + sum(skipped)


class MicroBatches(Dataset[Batch]):
    """Reads micro-batches: sample by sample, or, of latents that lie on a disk, all samples at once."""

    def __init__(self, fetcher: Fetcher[Item], draws: BatchDraws | None = None) -> None:
        self.fetcher, self._draws = fetcher, draws
        self.remote = any(not is_local(url) for url in fetcher.reader.index.shards)
        self._memory = BatchMemory()
        item = fetcher.make_item
        batched = isinstance(item, LatentItem) and not self.remote
        self.latents = LatentReader(fetcher, item) if batched and isinstance(item, LatentItem) else None

    def batch(self, run: Run) -> Batch:
        """The micro-batch of a run.

        Raises:
            DataError: as `Fetcher.fetch`.
            StoreError: if the shards' store cannot be reached.
        """
        batch = _whole(self[run])
        del batch[SKIPPED]
        return batch

    def __getitem__(self, run: Run) -> Batch:
        try:
            batch = self._read(run)
            return batch if self._draws is None else batch | self._draws.of(batch)
        except DataError as error:  # told as a value: torch would wrap the worker's traceback around it
            return {_FAULT: str(error), _UNREACHABLE: isinstance(error, StoreError)}

    def _read(self, run: Run) -> Batch:
        if self.latents is not None:
            return self.latents.read(run)
        if isinstance(self.fetcher.make_item, ImageItem):
            return self._images(run, self.fetcher.make_item)
        return _collate(
            [
                self._row(part.ticket(row), None, sample)
                for part in run.parts(_READ_AHEAD)
                for row, sample in enumerate(self.fetcher.read_ahead(part))
            ]
        )

    def _images(self, run: Run, item: ImageItem) -> Batch:
        """Decoded where they stay: of images, copying from one place to another is most of what is not decoding."""
        images = self._memory.take((run.samples, *item.shape(run.bucket)), np.dtype(np.uint8))
        rows: list[dict[str, Any]] = []
        for part in run.parts(_READ_AHEAD):
            for row, sample in enumerate(self.fetcher.read_ahead(part)):
                out = images[len(rows)]
                rows.append(self._row(part.ticket(row), partial(item, out=out), sample))
                del rows[-1]["image"]
        return {"image": torch.from_numpy(images), **_collate(rows)}

    def _row(
        self,
        ticket: Ticket,
        make_item: Callable[[Sample, int], Item] | None = None,
        sample: Sample | None = None,
    ) -> dict[str, Any]:
        fetched = self.fetcher.fetch(ticket, make_item, sample)
        return {**fetched.item, "position": ticket.position, "key": fetched.key, SKIPPED: fetched.skipped}


def _whole(batch: Batch) -> Batch:
    """The batch, or the fault that a worker returned in its place, raised."""
    fault = batch.pop(_FAULT, None)
    if fault is not None:
        raise (StoreError if batch[_UNREACHABLE] else DataError)(fault)
    return batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _collate(items: list[dict[str, Any]]) -> Batch:
    batch: Batch = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))  # [b, ...]
        elif isinstance(first, str):
            batch[name] = values
        else:
            batch[name] = torch.tensor(values, dtype=torch.int64)  # [b]
    return batch

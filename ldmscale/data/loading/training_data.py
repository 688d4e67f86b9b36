"""The samples of a training run: where reading starts, how much may be unusable, and how ranks agree on each batch.

A rank without a batch would leave the others waiting in a collective. So all ranks take every micro-batch together:
each reports its outcome before any of them works on the batch, and a fault of one rank stops all of them alike.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ldmscale.data.loading.draws import BatchDraws
from ldmscale.data.loading.loader import Batch, Loader, MakeItem
from ldmscale.data.loading.skipped_samples import FREE_FAULTS, Ledger
from ldmscale.data.shards.mixture import Mixture
from ldmscale.distributed.collectives import gather_lists, sums_over_ranks
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import DataError, LdmscaleError, StoppedEarlyError

log = logging.getLogger(__name__)

_LISTED = 8  # ranks whose faults are reported


@dataclass(frozen=True)
class BadDataLimit:
    """How many samples may be unusable.

    Attributes:
        max_share: of the samples read by all ranks since the start.
        max_in_a_row: consecutive samples on one rank.
    """

    max_share: float = 1.0
    max_in_a_row: int = 1_000_000


class TrainingData:
    """The samples of a run in their endless order, read in micro-batches by all ranks together.

    `start` sets the position; `next_batch` reads on from there.

    Args:
        index: the index of the shards.
        make_item: makes the item of (sample, position).
        ranks: this rank among the others.
        seed, global_batch, rank_micro_batch, block_shards, workers, pin_memory: as `Loader`.
        ledger: records the samples that cannot be used.
        limit: how many samples may be unusable.
        draws: as `Loader`.
    """

    def __init__(
        self,
        index: Mixture,
        make_item: MakeItem,
        ranks: Ranks,
        *,
        seed: int,
        global_batch: int,
        rank_micro_batch: int,
        block_shards: int,
        workers: int,
        pin_memory: bool,
        ledger: Ledger,
        limit: BadDataLimit,
        draws: BatchDraws | None = None,
    ) -> None:
        self.index, self.make_item, self.limit = index, make_item, limit
        # Names the samples and their order: equal fingerprints give equal batches at equal positions.
        self.fingerprint = f"{index.fingerprint}, seed {seed}, blocks of {block_shards}"
        self.global_batch = global_batch
        self.workers = workers
        self._open = partial(
            Loader,
            index,
            make_item,
            seed=seed,
            rank=ranks.rank,
            world=ranks.size,
            global_batch=global_batch,
            rank_micro_batch=rank_micro_batch,
            ledger=ledger,
            block_shards=block_shards,
            pin_memory=pin_memory,
            draws=draws,
        )
        self._loader: Loader | None = None

    def start(self, position: int, consumed: Sequence[int] | None = None) -> None:
        """Read from `position` on; with aspect-ratio buckets `consumed` has the position of each bucket."""
        self.close()
        self._loader = self._open(position=position, consumed=consumed, workers=self.workers)

    def next_batch(self) -> Batch:
        """The next micro-batch of this rank; raises as `next_for_all`. Collective."""
        return next_for_all(self._reading, self.limit)

    @property
    def position(self) -> int:
        """Samples of all ranks in the steps that were handed out completely."""
        return self._reading.position

    @property
    def consumed(self) -> Sequence[int]:
        """The same by bucket."""
        return self._reading.consumed

    @property
    def wait_seconds(self) -> float:
        """How long this rank has waited for its batches since `start`."""
        return self._reading.wait_seconds

    def close(self) -> None:
        """End the workers."""
        if self._loader is not None:
            self._loader.close()

    def first_samples(self, count: int) -> Iterator[Batch]:
        """The steps that hold the first `count` samples of the order, read in this process. Collective.

        "counts" bool [b] is False for samples that only fill up the last step. No limit on unusable samples applies.
        """
        loader = self._open(workers=0)
        for _ in range(-(-count // self.global_batch) * loader.accumulation):
            batch = next_for_all(loader)
            yield batch | {"counts": batch["position"] < count}

    def first_sample(self) -> Batch:
        """A batch of one sample, the same on every rank and at every start of the run."""
        return fixed_batch(self.index, self.make_item, 1)

    @property
    def _reading(self) -> Loader:
        if self._loader is None:
            raise RuntimeError("start() sets the position that batches are read from; call it first")
        return self._loader


def fixed_batch(index: Mixture, make_item: MakeItem, count: int) -> Batch:
    """A batch of `count` samples, the same on every rank and in every run: the first in the order of seed 0.

    With aspect-ratio buckets all are of one; `held_out.fixed_batches` has samples of each.
    """
    loader = Loader(index, make_item, seed=0, rank=0, world=1, global_batch=count, rank_micro_batch=count)
    return next(loader)


def next_for_all(loader: Loader, limit: BadDataLimit | None = None) -> Batch:
    """The next micro-batch of this rank, if every rank has one and the limit on unusable samples holds. Collective.

    Raises:
        DataError: on all ranks alike (`shared`), if one of them has no batch or too many samples were unusable.
        LdmscaleError: likewise, if a worker of one of them failed.
        StoppedEarlyError: likewise, if one of them was asked to stop and still had no batch some seconds later.
    """
    limits = limit or BadDataLimit()
    batch: Batch = {}
    fault, crash, stopped = "", None, ""
    try:
        batch = next(loader)
        if loader.bad_in_a_row > limits.max_in_a_row:
            fault = (
                f"{loader.bad_in_a_row} samples one after another cannot be used, more than "
                f"data.max_bad_in_a_row={limits.max_in_a_row}; data_ledger.jsonl names them"
            )
    except DataError as error:
        fault = str(error)
    except StoppedEarlyError as error:
        stopped = str(error)
    except Exception as error:  # a killed worker, for instance: report it to the other ranks before ending
        fault, crash = f"{type(error).__name__}: {error}", error
    failed, crashed, ended, replaced, read = sums_over_ranks(
        [bool(fault), crash is not None, bool(stopped), loader.replaced, loader.read]
    )
    if failed:
        faults = gather_lists([f"rank {loader.rank}: {fault}"] if fault else [])
        if crashed:
            raise LdmscaleError("\n".join(faults), shared=True) from crash
        raise DataError(faults[:_LISTED], shared=True)
    if ended:
        reasons = gather_lists([f"rank {loader.rank}: {stopped}"] if stopped else [])
        raise StoppedEarlyError("\n".join(reasons[:_LISTED]))
    if replaced > FREE_FAULTS and replaced > limits.max_share * read:
        raise DataError(
            f"{replaced:.0f} of the {read:.0f} samples that were read since the start cannot be used, more than "
            f"data.max_bad_share={limits.max_share}; data_ledger.jsonl names them; `ldmscale index "
            "data.check=decode data.shards=...` looks through all, and data.min_caption_words=1 leaves out those without a "
            "caption",
            shared=True,
        )
    return batch

"""The endless stream of raw samples of one rank: exact order, exact resume, any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ldmscale.data.loading.fetch import Fetcher, Ticket
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.order.sequence import Sequence as SampleSequence
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.mixture import Mixture, WeightedShards
from ldmscale.data.shards.reader import Sample
from ldmscale.errors import ConfigError
from ldmscale.storage.object_store import Storage


def rank_positions(position: int, step: int, *, rank: int, world: int, global_batch: int) -> range:
    """The positions that a rank takes in the `step`-th step after `position`: its part of the batch."""
    part = global_batch // world
    first = position + step * global_batch + rank * part
    return range(first, first + part)


def check_batch(*, rank: int, world: int, global_batch: int, position: int) -> None:
    """Checks that a batch can be shared out.

    Raises:
        ConfigError: with every fault, if it cannot.
    """
    faults = []
    if world < 1 or not 0 <= rank < world:
        faults.append(f"rank {rank} of {world} ranks does not exist")
    elif global_batch < 1 or global_batch % world:
        faults.append(
            f"train.global_batch={global_batch} cannot be shared out to {world} ranks; make it a multiple "
            f"of {world}"
        )
    if position < 0:
        faults.append(f"position must be at least 0, got {position}")
    if faults:
        raise ConfigError(faults)


class ShardStream:
    """Iterates for ever over (key, sample) of WebDataset shards; sample maps extensions to bytes.

    At step s the rank takes positions [s*G + r*G/W, s*G + (r+1)*G/W), counted from `position`, of one global
    sequence that knows nothing of ranks. So the samples of a step are the same for any world, and a stream
    started at the `position` of another one goes on where that one stopped, at any number of ranks and any
    global batch.

    Args:
        shards: pattern, list of patterns, list of `WeightedShards` (a mixture), or an open index (without
            buckets). Shards without an index are looked through first.
        seed: the run's seed; gives the order.
        rank: this rank.
        world: number of ranks.
        global_batch: samples a step of all ranks together.
        position: samples consumed by all ranks before.
        block_shards: shards whose samples are shuffled together.
        ledger: where unreadable samples are written down; they are replaced by others. By default they are
            logged.
        storage: how remote shards are reached.

    Raises:
        DataError: if shards are missing, changed or empty.
        ConfigError: if the batch cannot be shared out.
    """

    def __init__(
        self,
        shards: str | Sequence[str] | Sequence[WeightedShards] | ShardIndex | Mixture,
        *,
        seed: int,
        rank: int,
        world: int,
        global_batch: int,
        position: int = 0,
        block_shards: int = 16,
        ledger: Ledger | None = None,
        storage: Storage | None = None,
    ) -> None:
        check_batch(rank=rank, world=world, global_batch=global_batch, position=position)
        if isinstance(shards, (ShardIndex, Mixture)):
            self.index = Mixture.of(shards)
        else:
            self.index = Mixture.open(_sets(shards), build_missing=True, storage=storage)
        sequence = SampleSequence(self.index, seed, block_shards)
        if len(sequence.shares) > 1:
            raise ConfigError(
                "this index has buckets, whose batches a Loader makes; give shards or a plain index"
            )
        self._fetcher = Fetcher(self.index, sequence, _raw, seed=seed, ledger=ledger or Ledger(None, rank))
        self._rank, self._world, self._global_batch = rank, world, global_batch
        self._position = position

    @property
    def position(self) -> int:
        """Samples consumed by all ranks in the steps that this rank has finished."""
        return self._position

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        while True:
            step = rank_positions(
                self._position, 0, rank=self._rank, world=self._world, global_batch=self._global_batch
            )
            for position in step:
                fetched = self._fetcher.fetch(Ticket(position, 0, position))
                if position == step[-1]:
                    self._position += self._global_batch
                yield fetched.key, fetched.item


def _raw(sample: Sample, position: int) -> dict[str, bytes]:
    return sample.members


def _sets(shards: str | Sequence[str] | Sequence[WeightedShards]) -> list[WeightedShards]:
    if isinstance(shards, str):
        return [WeightedShards(shards)]
    weighted = [entry for entry in shards if isinstance(entry, WeightedShards)]
    return weighted or [WeightedShards([entry for entry in shards if isinstance(entry, str)])]

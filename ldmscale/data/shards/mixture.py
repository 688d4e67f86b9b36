"""Several sets of shards, each drawn from with its weight, seen as one index."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.selection import Selection
from ldmscale.data.shards.urls import expand
from ldmscale.errors import DataError
from ldmscale.storage.digest import sha256
from ldmscale.storage.object_store import Storage


class WeightedShards(NamedTuple):
    """One set of a mixture: its shards by pattern, and its weight; None weighs it by its number of samples."""

    shards: str | Sequence[str]
    weight: float | None = None


class Mixture:
    """The sets of a mixture as one list of shards. A single set is a mixture of one.

    Shards are numbered through, set after set.

    Attributes:
        parts: the sets.
        weights: of each, float64 [parts], adding up to 1.
        shards, counts, bucket_counts, sizes, total, storage: of all sets together, as those of `ShardIndex`.
        first_shard: number of each set's first shard, [parts].
    """

    def __init__(self, parts: Sequence[ShardIndex], weights: Sequence[float | None] | None = None) -> None:
        self.parts = tuple(parts)
        self.shards = [url for part in self.parts for url in part.shards]
        self.counts = np.concatenate([part.counts for part in self.parts])
        self.bucket_counts = np.concatenate([part.bucket_counts for part in self.parts])
        self.sizes = np.concatenate([part.sizes for part in self.parts])
        self.total = sum(part.total for part in self.parts)
        self.storage = self.parts[0].storage
        self.first_shard = np.cumsum([0, *(len(part.shards) for part in self.parts)])
        self.weights = _normalised(weights, [part.total for part in self.parts])

    @classmethod
    def of(cls, index: ShardIndex | Mixture) -> Mixture:
        return index if isinstance(index, Mixture) else cls([index])

    @classmethod
    def open(
        cls,
        sets: Sequence[WeightedShards],
        *,
        build_missing: bool = False,
        allow_pipe: bool = False,
        selection: Selection | None = None,
        storage: Storage | None = None,
        open_set: Callable[..., ShardIndex] = ShardIndex.open,
    ) -> Mixture:
        """Opens the index of every set. `open_set` does it for one, as `ShardIndex.open`.

        Raises as `ShardIndex.open`, with the faults of all sets.
        """
        parts: list[ShardIndex] = []
        faults: list[str] = []
        for wanted in sets:
            try:
                urls = expand(wanted.shards, allow_pipe=allow_pipe, storage=storage)
                parts.append(
                    open_set(urls, build_missing=build_missing, selection=selection, storage=storage)
                )
            except DataError as error:
                faults += error.faults
        if faults:
            raise DataError(faults)
        return cls(parts, [wanted.weight for wanted in sets])

    def span(self, shard: int, index: int) -> tuple[int, int]:
        """Returns (offset, bytes) of sample `index` of shard number `shard`. Raises IndexError if there is none."""
        part = 0 if len(self.parts) == 1 else int(np.searchsorted(self.first_shard, shard, side="right")) - 1
        return self.parts[part].span(shard - int(self.first_shard[part]), index)

    def spans(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (offsets, bytes) of several samples, int64 [n] each; the samples must exist."""
        if len(self.parts) == 1:
            return self.parts[0].spans(shards, indices)
        found = [self.span(int(shard), int(index)) for shard, index in zip(shards, indices, strict=True)]
        offsets, sizes = np.array(found, dtype=np.int64).reshape(-1, 2).T
        return offsets, sizes

    @property
    def fingerprint(self) -> str:
        """Identifies sets and weights: a resume with others is none."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        known = [[part.fingerprint for part in self.parts], self.weights.tolist()]
        return sha256(json.dumps(known))[:16]


def _normalised(weights: Sequence[float | None] | None, totals: Sequence[int]) -> np.ndarray:
    given = list(weights) if weights is not None else [None] * len(totals)
    if any(weight is None for weight in given):
        if not all(weight is None for weight in given):
            raise DataError(
                "data.shards gives a weight to some sets and not to others; give it to all, or to none"
            )
        found = np.array(totals, dtype=np.float64)
    else:
        found = np.array(given, dtype=np.float64)
    if not (np.isfinite(found).all() and (found > 0).all()):
        raise DataError(f"weights of data.shards must be above 0, got {given}")
    shares: np.ndarray = found / found.sum()
    return shares

"""The index of shards: where each sample that a run takes lies, 12 bytes a sample, memory-mapped.

    SHARDS/.ldmscale_index/00000.tar.idx   the record of each shard (`records`)
    SHARDS/.ldmscale_index/set-*.idx       spans of a whole list of shards in one file, made from the others

Where the shards' folder cannot be written (or is remote) the files lie in `~/.cache/ldmscale/index`. Every
file appears whole, so ranks may share the work or repeat it. A shard that changed since is refused: its order
would be another.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from ldmscale import redact
from ldmscale.data.images.decode import MAX_PIXELS
from ldmscale.data.shards.records import (
    FORMAT,
    Record,
    find,
    fresh,
    index_shard,
    read_codes,
    read_record,
    read_selection,
    read_spans,
    writable_folder,
    write_index,
)
from ldmscale.data.shards.report import IndexReport, check_shards
from ldmscale.data.shards.scan import SPAN, json_line
from ldmscale.data.shards.selection import Selection
from ldmscale.data.shards.urls import run_pipes, shard_name, shard_states
from ldmscale.errors import DataError
from ldmscale.storage.digest import sha256
from ldmscale.storage.object_store import ShardState, Storage
from ldmscale.storage.plain_values import Count, checked, parsed

__all__ = ["IndexReport", "ShardIndex", "check_shards"]

log = logging.getLogger(__name__)

WRITTEN = "written"
"""In place of a selection: the writer of the shards has put their samples into buckets."""

_LISTED = 10


class ShardIndex:
    """Where every sample of a list of shards lies. Made by `open` or `build`; may be pickled to workers.

    With a selection only the samples that it takes are in it. They lie bucket by bucket within each shard.

    Attributes:
        shards: URLs, in the order given.
        counts: samples in each, int64 [shards].
        bucket_counts: the same by bucket, int64 [shards, buckets].
        sizes: bytes of each, int64 [shards].
        total: samples in all.
        storage: how remote shards are reached.
        names: the shards as the file has them.
    """

    def __init__(
        self, path: Path, storage: Storage | None = None, shards: Sequence[str] | None = None
    ) -> None:
        """`shards`: their URLs, where the file may not hold them since there are secrets in them."""
        self.path = path
        self.storage = storage or Storage()
        header, begin = _read_header(path, shards)
        self.shards: list[str] = header.urls if shards is None else list(shards)
        self._urls, self.names = shards, header.urls
        self.counts = np.array(header.counts, dtype=np.int64)
        self.sizes = np.array(header.sizes, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.bucket_counts = np.array(header.buckets or self.counts[:, None], dtype=np.int64)
        self._selection = header.selection
        self._first = np.concatenate([[0], np.cumsum(self.counts)])
        self._spans: np.ndarray = (
            np.memmap(path, dtype=SPAN, mode="r", offset=begin, shape=(self.total,))
            if self.total
            else np.empty(0, dtype=SPAN)
        )

    def __reduce__(self) -> tuple[type[ShardIndex], tuple[Path, Storage, Sequence[str] | None]]:
        return ShardIndex, (self.path, self.storage, self._urls)  # workers map the same file anew

    def span(self, shard: int, index: int) -> tuple[int, int]:
        """Returns (offset, bytes) of sample `index` of shard number `shard`.

        Raises:
            IndexError: if the shard has no such sample.
            DataError: if the sample does not lie in the shard.
        """
        if not 0 <= index < self.counts[shard]:
            raise IndexError(f"{self.shards[shard]} has {self.counts[shard]} samples, no number {index}")
        offset, nbytes = map(int, self._spans[self._first[shard] + index])
        if offset + nbytes > self.sizes[shard]:
            raise self._outside(shard, index, offset, nbytes)
        return offset, nbytes

    def spans(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (offsets, bytes) of several samples, int64 [n] each; the samples must exist.

        Raises:
            DataError: if a sample does not lie in its shard.
        """
        found = np.asarray(self._spans)[self._first[shards] + indices]
        offsets, sizes = found["offset"].astype(np.int64), found["nbytes"].astype(np.int64)
        outside = (offsets < 0) | (offsets > self.sizes[shards] - sizes)
        if outside.any():
            at = int(np.argmax(outside))
            raise self._outside(int(shards[at]), int(indices[at]), int(found["offset"][at]), int(sizes[at]))
        return offsets, sizes

    def _outside(self, shard: int, index: int, offset: int, nbytes: int) -> DataError:
        what = f"sample {index} of {self.shards[shard]} has {nbytes} bytes at offset {offset}, the shard has {self.sizes[shard]}"
        return _damaged(self.path, what)

    @property
    def fingerprint(self) -> str:
        """Identifies the set by names, sizes, counts and selection, in order: a resume with another set is none."""
        names = [shard_name(url) for url in self.shards]
        known = [names, self.sizes.tolist(), self.counts.tolist()]
        if self._selection is not None:
            known += [self._selection, self.bucket_counts.tolist()]
        return sha256(json.dumps(known))[:16]

    @classmethod
    def open(
        cls,
        shards: Sequence[str],
        *,
        build_missing: bool = False,
        selection: Selection | None = None,
        storage: Storage | None = None,
    ) -> ShardIndex:
        """Opens the index of `shards`.

        Args:
            shards: URLs as `shards.expand` gives them.
            build_missing: look through shards that have no index yet instead of raising (tar headers only, and what
                the selection asks for).
            selection: which samples are taken; None takes all.
            storage: how remote shards are reached.

        Raises:
            DataError: naming every shard that is missing, not indexed or changed since it was indexed, with
                the remedy; or if there is no sample in any.
        """
        urls, store = list(shards), storage or Storage()
        wanted = None if selection is None or selection.everything else selection
        if build_missing:
            run_pipes(urls)
        states, faults = _states(urls, store)
        if faults:
            raise DataError(_some(faults))
        merged = _merged_path(urls, states, wanted)
        if not merged.exists():
            records = _records(urls, wanted)
            if build_missing:
                for number, record in enumerate(records):
                    if None in record:
                        index_shard(
                            urls[number], states[number], "spans", "txt", MAX_PIXELS,
                            storage=store, selection=wanted, keep_record=record[0] is not None,
                        )  # fmt: skip
                records = _records(urls, wanted)
            _merge(urls, states, records, merged, wanted)
        index = cls(merged, store, None if urls == _kept(urls) else urls)
        if index.total == 0:
            raise DataError(
                f"the {len(urls)} shards hold no sample{'' if wanted is None else ' that is selected'} at all; look at "
                "what `ldmscale index data.shards=...` says"
            )
        if index.shards != urls:  # its name is a hash of them, and its content may be anyone's
            raise DataError(
                f"the index {merged} names other shards than data.shards: delete it, and start the same command again"
            )
        return index

    @classmethod
    def build(
        cls,
        shards: Sequence[str],
        *,
        check: str = "spans",
        caption_source: str = "txt",
        max_pixels: int = MAX_PIXELS,
        rank: int = 0,
        world: int = 1,
        selection: Selection | None = None,
        storage: Storage | None = None,
    ) -> ShardIndex | None:
        """Looks through every shard that is new or changed since, and opens the index.

        With several ranks each takes every world-th shard and gets None; call `open` behind a barrier.

        Raises:
            DataError: if a shard is missing or cannot be read, or none holds a sample.
        """
        report = check_shards(
            shards,
            check,
            caption_source=caption_source,
            max_pixels=max_pixels,
            rank=rank,
            world=world,
            selection=selection,
            storage=storage,
        )
        gone = [str(item) for item in report.damage if item.kind in ("missing_shard", "unreadable_shard")]
        if gone:
            raise DataError(_some([f"{item}; check data.shards" for item in gone]))
        return cls.open(shards, selection=selection, storage=storage) if world == 1 else None


class _Header(BaseModel):
    """The first line of the file of a list of shards."""

    urls: list[str]
    counts: list[Count]
    sizes: list[Count]
    buckets: list[Annotated[list[Count], Field(min_length=1)]] | None = None
    selection: str | None = None


def written_header(
    names: Sequence[str], sizes: Sequence[int], counts: Sequence[int], buckets: Sequence[Sequence[int]] | None
) -> bytes:
    """The first line of an index that the writer of shards makes itself; the spans of all samples follow it.

    Args:
        names: of the shards.
        sizes: bytes of each. counts: samples of each. buckets: the same by aspect-ratio bucket; None without buckets.
    """
    header: dict[str, Any] = {
        "format": FORMAT,
        "urls": list(names),
        "sizes": list(sizes),
        "counts": list(counts),
    }
    if buckets is not None:
        header |= {"selection": WRITTEN, "buckets": [list(row) for row in buckets]}
    return json_line(header)


def _read_header(path: Path, shards: Sequence[str] | None) -> tuple[_Header, int]:
    """The first line, and the bytes it has. Raises DataError where it does not describe the rest of the file."""
    try:
        with open(path, "rb") as stream:
            line = stream.readline()
            behind = os.fstat(stream.fileno()).st_size - len(line)
        header = checked(_Header, parsed(line))
        for name in ("counts", "sizes", "buckets"):
            found = getattr(header, name)
            if found is not None and len(found) != len(header.urls):
                raise ValueError(f"{len(header.urls)} shards have {len(found)} {name}")
        if shards is not None and len(shards) != len(header.urls):
            raise ValueError(f"found {len(header.urls)} shards, expected {len(shards)}")
        if header.buckets and (
            len({len(row) for row in header.buckets}) > 1
            or [sum(row) for row in header.buckets] != header.counts
        ):
            raise ValueError("the counts of the buckets do not add up")
        if behind != sum(header.counts) * SPAN.itemsize:
            raise ValueError(f"found {behind} bytes for {sum(header.counts)} samples")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return header, len(line)


def _damaged(path: Path, what: object) -> DataError:
    return DataError(f"the index {path} is damaged ({what}): delete it, and start the same command again")


def _kept(urls: list[str]) -> list[str]:
    """As the file holds them: without secrets."""
    return [redact.text(url) for url in urls]


def _states(urls: Sequence[str], storage: Storage) -> tuple[list[ShardState], list[str]]:
    found = shard_states(urls, storage)
    states = [state for state in found if isinstance(state, ShardState)]
    faults = [
        f"shard {url} cannot be found: {state}; check data.shards"
        for url, state in zip(urls, found, strict=True)
        if isinstance(state, str)
    ]
    return states, faults


_Known = tuple[Record | None, Record | None]
"""A shard's record and selection. Without a selection the second is the first."""


def _records(urls: Sequence[str], selection: Selection | None) -> list[_Known]:
    records = []
    for url in urls:
        record = read_record(url)
        records.append((record, record if selection is None else read_selection(url, selection)))
    return records


def _merge(
    urls: list[str],
    states: list[ShardState],
    records: list[_Known],
    merged: Path,
    selection: Selection | None,
) -> None:
    faults = []
    for url, state, pair in zip(urls, states, records, strict=True):
        again = f"run `ldmscale index data.shards={url}` (or with your whole pattern and the same filters)"
        for record in pair if selection is not None else pair[:1]:
            if record is None:
                faults.append(
                    f"shard {url} has no index{'' if pair[0] is None else ' for these filters'}; {again}"
                )
                break
            if not fresh(record, state):
                was, now = (record["size"], record["version"]), (state.size, state.version)
                faults.append(
                    f"shard {url} changed since it was indexed (size and version {was}, now {now}); if that was "
                    f"meant, {again}"
                )
                break
    if faults:
        raise DataError(_some(faults))
    known = [pair[1] for pair in records if pair[1] is not None]
    header: dict[str, Any] = {
        "format": FORMAT,
        "urls": _kept(urls),
        "sizes": [state.size for state in states],
        "counts": [record["samples"] if selection is None else sum(record["buckets"]) for record in known],
    }
    if selection is not None:
        header |= {"selection": selection.key, "buckets": [record["buckets"] for record in known]}
    for old in merged.parent.glob(f"{merged.name.rsplit('-', 1)[0]}-*.idx"):
        if old != merged:
            old.unlink(missing_ok=True)  # the same list at an earlier time; who has it mapped keeps it
    write_index(merged, _merged_parts(header, urls, known, selection))


def _merged_parts(
    header: dict[str, Any], urls: list[str], records: list[Record], selection: Selection | None
) -> Iterator[bytes]:
    yield json_line(header)
    for url, record in zip(urls, records, strict=True):
        count = record["samples"]
        spans = read_spans(url, count, record["size"])
        if selection is not None:
            codes = read_codes(url, selection, count)
            by_bucket = np.argsort(codes, kind="stable")
            if np.bincount(codes, minlength=selection.buckets + 1)[1:].tolist() != record["buckets"]:
                raise DataError(
                    f"the index of shard {url} is damaged: its counts by bucket are not those of its samples; delete it and run "
                    f"`ldmscale index data.shards={url}`"
                )
            spans = spans[by_bucket[np.count_nonzero(codes == 0) :]]
        yield spans.tobytes()


def _merged_path(urls: list[str], states: list[ShardState], selection: Selection | None) -> Path:
    wanted = [FORMAT, urls] if selection is None else [FORMAT, urls, selection.key]
    which = sha256(json.dumps(wanted))[:16]
    version = sha256(json.dumps([[state.size, state.version] for state in states]))[:16]
    name = f"set-{which}-{version}.idx"
    return find(urls[0], name) or writable_folder(urls[0]) / name


def _some(faults: list[str]) -> list[str]:
    return (
        faults
        if len(faults) <= _LISTED
        else [*faults[:_LISTED], f"... and {len(faults) - _LISTED} more shards"]
    )

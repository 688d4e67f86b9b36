"""Reads one sample: its span of a shard, parsed into members."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from dataclasses import dataclass

from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.mixture import Mixture
from ldmscale.data.shards.tar import TarFault, members, plain_members, split_name
from ldmscale.data.shards.urls import is_local, local_path
from ldmscale.errors import DataError

log = logging.getLogger(__name__)

OPEN_FILES = 64


@dataclass(frozen=True)
class Sample:
    """One sample of a shard.

    `members` maps extensions in lower case, without the leading dot, to bytes: "jpg", "txt", "latent.npy" ...
    """

    key: str
    shard: str
    members: dict[str, bytes]
    bucket: int = 0  # of the aspect-ratio buckets, where the run has some


class SampleReader:
    """Reads samples of an index by number. May be pickled to workers; each process opens its own files."""

    def __init__(self, index: ShardIndex | Mixture) -> None:
        self.index = index
        self._files: OrderedDict[int, int] = (
            OrderedDict()
        )  # shard number -> file descriptor, least used first
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type[SampleReader], tuple[ShardIndex | Mixture]]:
        return SampleReader, (self.index,)

    def read(self, shard: int, index: int, bucket: int = 0) -> Sample:
        """Reads sample `index` of shard number `shard`.

        Raises:
            DataError: if its bytes cannot be read or are no sample any more.
            StoreError: if the store of a remote shard cannot be reached.
        """
        url = self.index.shards[shard]
        offset, nbytes = self.index.span(shard, index)
        local = is_local(url)
        data = (
            self._read_local(shard, offset, nbytes)
            if local
            else self.index.storage.read(url, offset, offset + nbytes)
        )
        if len(data) < nbytes:
            raise DataError(
                f"{len(data)} of {nbytes} bytes at offset {offset} could be read; the shard was cut since "
                "it was indexed"
            )
        return _parse(data, url, bucket)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_local(self, shard: int, offset: int, nbytes: int) -> bytes:
        try:
            return os.pread(self.descriptor(shard), nbytes, offset)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from error

    def descriptor(self, shard: int) -> int:
        """An open file of a local shard; it stays open at least until the next call.

        Raises:
            DataError: if the shard has another size than it was indexed with.
            OSError: if it cannot be opened.
        """
        if self._owner != os.getpid():
            # After a fork: descriptors are shared with the parent, which may close them; pread does not mind,
            # LRU does.
            self._files, self._owner = OrderedDict(), os.getpid()
        known = self._files.get(shard)
        if known is not None:
            self._files.move_to_end(shard)
            return known
        handle = os.open(local_path(self.index.shards[shard]), os.O_RDONLY)
        size = os.fstat(handle).st_size
        if size != self.index.sizes[shard]:
            os.close(handle)
            raise DataError(
                f"the shard has {size} bytes and had {self.index.sizes[shard]} when it was indexed; run "
                "`ldmscale index data.shards=...`"
            )
        self._files[shard] = handle
        while len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return handle


def _parse(data: bytes, url: str, bucket: int) -> Sample:
    found: dict[str, bytes] = {}
    key = ""
    plain = plain_members(data)
    if plain is not None:
        for name, value in plain:
            named = split_name(name)
            if named is not None:
                key = named[0]
                found.setdefault(named[1], value)
        return Sample(key, url, found, bucket)
    try:
        for member in members(lambda offset, count: data[offset : offset + count], len(data)):
            named = None if member.refused else split_name(member.name)
            if named is None:
                continue
            key = named[0]
            if named[1] not in found:  # of two members with one extension the first counts
                found[named[1]] = data[member.data : member.data + member.size]
    except TarFault as fault:
        if fault.kind != "no_end_mark":  # a span ends with its last member
            raise DataError(f"its tar headers make no sense any more: {fault.detail}") from fault
    return Sample(key, url, found, bucket)

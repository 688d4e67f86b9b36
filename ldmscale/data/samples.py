"""Reads one sample: its span of a shard, parsed into members."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from dataclasses import dataclass

import fsspec

from ldmscale.data.index import ShardIndex
from ldmscale.data.shards import is_local, local_path
from ldmscale.data.tar import TarFault, members, split_name
from ldmscale.errors import DataError

log = logging.getLogger(__name__)

_OPEN_FILES = 64
_REMOTE_TRIES = 4
_FIRST_WAIT = 0.5  # seconds; doubles with each try


@dataclass(frozen=True)
class Sample:
    """One sample of a shard.

    `members` maps extensions in lower case, without the leading dot, to bytes: "jpg", "txt", "latent.npy" ...
    """

    key: str
    shard: str
    members: dict[str, bytes]


class SampleReader:
    """Reads samples of an index by number. May be pickled to workers; each process opens its own files."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._files: OrderedDict[int, int] = (
            OrderedDict()
        )  # shard number -> file descriptor, least used first
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type[SampleReader], tuple[ShardIndex]]:
        return SampleReader, (self.index,)

    def read(self, shard: int, index: int) -> Sample:
        """Reads sample `index` of shard number `shard`.

        Raises:
            DataError: if its bytes cannot be read or are no sample any more.
        """
        url = self.index.shards[shard]
        offset, nbytes = self.index.span(shard, index)
        data = self._read_local(shard, offset, nbytes) if is_local(url) else _read_remote(url, offset, nbytes)
        if len(data) < nbytes:
            raise DataError(
                f"{len(data)} of {nbytes} bytes at offset {offset} could be read; the shard was cut since "
                "it was indexed"
            )
        return _parse(data, url)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_local(self, shard: int, offset: int, nbytes: int) -> bytes:
        try:
            return os.pread(self._descriptor(shard), nbytes, offset)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from error

    def _descriptor(self, shard: int) -> int:
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
        while len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return handle


def _read_remote(url: str, offset: int, nbytes: int) -> bytes:
    wait = _FIRST_WAIT
    for attempt in range(1, _REMOTE_TRIES + 1):
        try:
            fs, path = fsspec.core.url_to_fs(url)
            data = bytes(fs.cat_file(path, start=offset, end=offset + nbytes))
            if len(data) == nbytes:
                return data
            reason = f"{len(data)} of {nbytes} bytes came"
        except FileNotFoundError as error:
            raise DataError("the shard is not there any more") from error
        except Exception as error:  # every backend raises its own kinds
            reason = f"{type(error).__name__}: {error}"
        if attempt < _REMOTE_TRIES:
            log.warning("%s at %d: %s; trying again in %.1f s", url, offset, reason, wait)
            time.sleep(wait)
            wait *= 2
    raise DataError(f"cannot be read after {_REMOTE_TRIES} tries: {reason}")


def _parse(data: bytes, url: str) -> Sample:
    found: dict[str, bytes] = {}
    key = ""
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
    return Sample(key, url, found)

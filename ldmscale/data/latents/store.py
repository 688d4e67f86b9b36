"""A set of latents in an object store, with the promises of `latent_folder`.

    URL/.00000.tar.SHA256.part   a whole tar that is not committed yet
    URL/00000.json               the commit, created for one process only (`distributed.conditional`)
    URL/00000.tar                the tar, by a copy within the store: its content follows from the json, whoever makes it

A shard is written to a file without a name on this host's disk (TMPDIR), which goes with its process, and is uploaded
whole. What is finished is known by listings, which serve for a while: of a large set a listing takes seconds. A shard that
this process has claimed is looked up anew.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ldmscale.data.latents.folder import (
    CLAIMS,
    MANIFEST,
    LatentFolder,
    decoded,
    draft_prefix,
    encoded,
    named_after,
    record_name,
)
from ldmscale.data.shards.urls import is_local
from ldmscale.storage.lease import LeaseLostError
from ldmscale.storage.object_store import ShardState, Storage
from ldmscale.storage.store_folder import StoreFolder
from ldmscale.storage.store_lease import StoreLease, StoreLeases

_LISTING_SECONDS = 2.0  # a listing serves for so long,
_LISTING_SHARE = 10.0  # and for so many times as long as it took


class LatentStore:
    """A set behind a URL. Methods are those of `LatentFolder`, and raise StoreError where the store cannot be reached."""

    remote = True
    poll_seconds = 2.0  # hundreds of ranks may wait for the last one: a store counts requests

    def __init__(self, url: str, storage: Storage | None = None) -> None:
        self.store = StoreFolder(url, storage or Storage())
        self._leases = StoreLeases(self.store, CLAIMS)
        self._known: dict[str, bytes] = {}  # records of finished shards
        self._fresh_until = float("-inf")
        self._lock = threading.Lock()  # one process looks once, whatever its threads

    def __str__(self) -> str:
        return self.store.url

    @contextmanager
    def draft(self, name: str) -> Iterator[tuple[Path, BinaryIO]]:
        with tempfile.TemporaryFile(prefix=draft_prefix(name)) as stream:
            yield Path(f"/dev/fd/{stream.fileno()}"), cast(BinaryIO, stream)

    def publish(self, draft: Path, name: str, record: dict[str, Any], check: Callable[[], None]) -> None:
        named = named_after(name, record)
        check()
        self.store.upload(draft, named)
        try:
            check()
        except LeaseLostError:
            # Else it may be the other's own, since the same latents make the same name.
            if self._settle(name):
                self.store.remove(named)
            raise
        if not self.store.create(record_name(name), encoded(record)):
            if self._settle(name):
                self.store.remove(named)
                return
            check()  # a record whose tar somebody has lost or cut: make the shard anew
            self.store.move(named, name)
            self.store.write(record_name(name), encoded(record))
        self._settle(name)

    def look_anew(self) -> None:
        """Believes nothing that it has seen."""
        with self._lock:
            self._known = {}
            self._fresh_until = float("-inf")

    def settled(self, name: str) -> dict[str, Any] | None:
        with self._lock:
            if name not in self._known and time.monotonic() > self._fresh_until:
                self._list()
            found = self._known.get(name)
        return None if found is None else decoded(found)

    def claim(self, name: str, timeout_seconds: float, on_lost: Callable[[], None]) -> StoreLease | None:
        what = name.removesuffix(".tar")
        lease = self._leases.take_if_free(what, timeout_seconds=timeout_seconds, on_lost=on_lost)
        if lease is not None and what != name:
            self._settle(name)
        return lease

    def forget_claims(self, but: str) -> None:
        self._leases.forget(but)

    def write_manifest(self, content: bytes) -> None:
        self.store.write(MANIFEST, content)
        left = [name for name in self.store.entries() if _is_draft(name)]  # of those who were killed
        self.store.remove(*left)

    def write_parts(self, name: str, parts: Iterable[bytes]) -> None:
        with tempfile.NamedTemporaryFile() as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            self.store.upload(Path(stream.name), name)

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self.store.storage.read(f"{self.store.url}/{name}", start, stop)

    def any_record(self) -> dict[str, Any] | None:
        with self._lock:
            self._list()
            found = next(iter(self._known.values()), None)
        return None if found is None else decoded(found)

    def withdraw_manifest(self) -> None:
        self.store.remove(MANIFEST)

    def _list(self) -> None:
        began = time.monotonic()
        entries = self.store.entries()
        wanted = [name for name in entries if name.endswith(".tar") and name not in self._known]
        drafts = {name.partition(".tar.")[0].removeprefix(".") for name in entries if _is_draft(name)}
        records = self.store.read_all([each for name in wanted if (each := record_name(name)) in entries])
        for name in wanted:
            record = records.get(record_name(name))
            if (
                record is not None
                and name.removesuffix(".tar") not in drafts
                and _whole(record, entries[name])
            ):
                self._known[name] = record
        # Committed by one who died before the tar got its name, or is just at it.
        for stem in drafts:
            if f"{stem}.tar" not in self._known and f"{stem}.json" in entries:
                self._finish(f"{stem}.tar")
        took = time.monotonic() - began
        self._fresh_until = time.monotonic() + max(_LISTING_SECONDS, _LISTING_SHARE * took)

    def _settle(self, name: str) -> bool:
        with self._lock:
            return self._finish(name)

    def _finish(self, name: str) -> bool:
        """Ends what was committed; whether the shard is finished. Asks the store."""
        self._known.pop(name, None)
        content = self.store.read(record_name(name))
        record = None if content is None else decoded(content)
        if content is None or record is None:
            return False
        self.store.move(named_after(name, record), name)
        if self.store.size(name) != record.get("bytes"):
            return False
        self._known[name] = content
        return True


LatentPlace = LatentFolder | LatentStore


def place_of(folder: str | Path | LatentPlace, storage: Storage | None = None) -> LatentPlace:
    """Where a set is written, by its folder or URL."""
    if isinstance(folder, (LatentFolder, LatentStore)):
        return folder
    return LatentFolder(folder) if is_local(str(folder)) else LatentStore(str(folder), storage)


def _is_draft(name: str) -> bool:
    return name.startswith(".") and ".tar." in name and name.endswith(".part")


def _whole(content: bytes, tar: ShardState) -> bool:
    record = decoded(content)
    return record is not None and record.get("bytes") == tar.size

"""A folder of an object store that is written into: s3://bucket/prefix, gs://bucket/prefix, or a path.

Every request is retried as `storage` says, so each may be made twice: what is written here allows that. fsspec's cache of
listings is switched off.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmscale.errors import DataError
from ldmscale.storage.object_store import AbsentError, ShardState, Short, Storage, state_of

_BYTES_A_TRY = 16 * 2**20  # of a large object, in the time that one try may take
_LISTING_TRIES = 3.0
_READ_TOGETHER = 1000


class StoreFolder:
    """Names are relative to `url`. Methods raise StoreError if the store cannot be reached or refuses us."""

    def __init__(self, url: str, storage: Storage) -> None:
        self.url = url.rstrip("/")
        self.storage = replace(storage, options={**storage.options, "use_listings_cache": False})

    def check(self) -> None:
        """Looks whether objects can be made and removed here.

        Raises:
            AbsentError: if there is no such bucket.
        """
        protocol, _, path = self.url.partition("://")
        bucket = f"{protocol}://{path.partition('/')[0]}"
        self.storage.ask("info", bucket)
        probe = f".probe.{secrets.token_hex(8)}"
        self.write(probe, b"probe")
        self.remove(probe)

    def make(self, folder: str = "") -> None:
        """Makes the folder, or one within, where the store has folders. One that exists is no fault."""
        self.storage.ask("makedirs", f"{self.url}/{folder}" if folder else self.url, exist_ok=True)

    def names(self) -> list[str]:
        """Names of the objects and folders in it, sorted."""
        try:
            found = self.storage.listing(self.url)
        except AbsentError:
            return []
        return sorted({entry["name"].rstrip("/").rpartition("/")[2] for entry in found})

    def entries(self) -> dict[str, ShardState]:
        """What lies in it, but not in folders within."""
        try:
            found = self.storage.listing(self.url)
        except AbsentError:
            return {}
        return _states(found, self._path(""))

    def below(self, folder: str) -> dict[str, ShardState]:
        """What lies in a folder within, however deep, by name in that folder."""
        path = self.storage.locate(f"{self.url}/{folder}")[1]
        try:
            found = self.storage.ask("find", f"{self.url}/{folder}", tries=_LISTING_TRIES, detail=True)
        except AbsentError:
            return {}
        return _states(found.values(), path)

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if it is not there."""
        try:
            found: dict[str, Any] = self.storage.info(f"{self.url}/{name}")
        except AbsentError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def read(self, name: str) -> bytes | None:
        """All bytes of a small object; None if it is not there."""
        try:
            return self.storage.content(f"{self.url}/{name}")
        except AbsentError:
            return None

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Small objects, many at a time; those that are not there are left out."""
        fs = self.storage.locate(self.url)[0]
        found: dict[str, bytes] = {}
        for first in range(0, len(names), _READ_TOGETHER):
            places = {self._path(name): name for name in names[first : first + _READ_TOGETHER]}

            def once(wanted: dict[str, str] = places) -> dict[str, bytes]:
                got = self.storage.bounded(fs, "cat", list(wanted), tries=_LISTING_TRIES, on_error="return")
                for value in got.values():
                    if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                        raise value
                return {wanted[place]: value for place, value in got.items() if isinstance(value, bytes)}

            found |= self.storage.persist(once, f"{self.url} ({len(places)} objects)")
        return found

    def create(self, name: str, content: bytes) -> bool:
        """Makes an object unless it is there; whether `content` is there then."""
        return self.storage.create(f"{self.url}/{name}", content)

    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces a small object."""
        self.storage.ask("pipe_file", f"{self.url}/{name}", content)

    def upload(self, file: Path, name: str) -> None:
        """Makes or replaces an object, in parts if it is large; it appears whole."""
        fs, path = self.storage.locate(f"{self.url}/{name}")
        tries = 2 + os.path.getsize(file) / _BYTES_A_TRY
        self.storage.persist(
            lambda: self.storage.bounded(fs, "put_file", str(file), path, tries=tries), f"{self.url}/{name}"
        )

    def download(self, name: str, file: Path, most_bytes: int) -> None:
        """Writes an object into a local file. Raises AbsentError if it is not there, DataError if it is larger."""
        url = f"{self.url}/{name}"
        size = int(self.storage.info(url)["size"])
        if size > most_bytes:
            raise DataError(
                f"{url} has {size} bytes, expected {most_bytes} at most: it is not what was written there"
            )
        fs, path = self.storage.locate(url)

        def once() -> None:
            self.storage.bounded(fs, "get_file", path, str(file), tries=2 + size / _BYTES_A_TRY)
            if (found := file.stat().st_size) != size:
                raise Short(f"{found} of {size} bytes came")

        self.storage.persist(once, url)

    def move(self, old: str, new: str) -> bool:
        """Gives an object another name, by a copy within the store; False if it is not there."""
        size = self.size(old)
        if size is None:
            return False
        try:
            self.storage.ask("cp_file", f"{self.url}/{old}", self._path(new), tries=2 + size / _BYTES_A_TRY)
        except AbsentError:  # another has moved it meanwhile
            return False
        self.remove(old)
        return True

    def remove(self, *names: str) -> None:
        """Removes objects, one after another, whether or not they are there."""
        for name in names:
            try:
                self.storage.ask("rm_file", f"{self.url}/{name}")
            except AbsentError:
                continue

    def remove_folder(self, name: str) -> None:
        """Removes a folder within and all below it, whether or not it is there."""
        with suppress(AbsentError):
            self.storage.ask("rm", f"{self.url}/{name}", tries=_LISTING_TRIES, recursive=True)

    def _path(self, name: str) -> str:
        return str(self.storage.locate(f"{self.url}/{name}" if name else self.url)[1])


def _states(found: Any, path: str) -> dict[str, ShardState]:
    prefix = path.rstrip("/") + "/"
    return {
        entry["name"].removeprefix(prefix): state_of(entry)
        for entry in found
        if entry["type"] == "file" and entry["name"].startswith(prefix)
    }

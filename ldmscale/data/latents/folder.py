"""Where a set of latents is written: a folder that all processes share. `store` is the same in an object store.

The json of a shard is its commit. It is linked into place, which succeeds for one process only; before, the tar stands
beside it under a name made of its checksum, from where anyone may move it to its own. So no process, however late it
wakes, can replace a finished shard or mix two, and a death at any moment leaves a shard that is finished or not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ldmscale.errors import DataError
from ldmscale.storage.atomic import create_file, move, open_new, write_file
from ldmscale.storage.lease import Lease, take_if_free
from ldmscale.storage.names import SHA256, accepted
from ldmscale.storage.plain_values import parsed_object

MANIFEST = "manifest.json"
CLAIMS = ".claims"


class LatentFolder:
    """A set in a folder. Methods take names of shards, such as "00000.tar"."""

    remote = False
    poll_seconds = 0.25  # between two looks at what others do

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def draft(self, name: str) -> Iterator[tuple[Path, BinaryIO]]:
        """A file that becomes the shard if it is published before the block ends; else it is gone then."""
        self.path.mkdir(parents=True, exist_ok=True)
        path, stream = open_new(self.path, draft_prefix(name))
        try:
            with stream:
                yield path, stream
        finally:
            path.unlink(missing_ok=True)

    def publish(self, draft: Path, name: str, record: dict[str, Any], check: Callable[[], None]) -> None:
        """Commits a shard, or throws it away if another process has finished it meanwhile.

        `check` raises if this process may not write any more.
        """
        path, named = self.path / name, self.path / named_after(name, record)
        check()
        try:
            move(draft, named)
        except FileNotFoundError:
            if self.settled(name) is None:
                raise
            return  # who finished it has tidied up
        if not create_file(self.path / record_name(name), encoded(record)):
            if self.settled(name) is not None:
                named.unlink(missing_ok=True)
                return
            check()  # a record whose tar was lost or truncated: the shard is replaced
            move(named, path)
            write_file(self.path / record_name(name), encoded(record))
        self.settled(name)
        self._remove_drafts(name, record_name(name))  # of processes that were killed, or come too late

    def look_anew(self) -> None:
        """Nothing is remembered here."""

    def settled(self, name: str) -> dict[str, Any] | None:
        """The record of a finished shard; None if it is not finished. Ends what a killed process had committed."""
        try:
            record = decoded((self.path / record_name(name)).read_bytes())
        except OSError:
            return None
        if record is None:
            return None
        path = self.path / name
        with suppress(FileNotFoundError):
            move(self.path / named_after(name, record), path)
        try:
            whole = path.stat().st_size == record.get("bytes")
        except OSError:
            return None
        return record if whole else None

    def claim(self, name: str, timeout_seconds: float, on_lost: Callable[[], None]) -> Lease | None:
        """The lease of a shard, or of what is called so; None if another process may hold it."""
        folder = self.path / CLAIMS / name.removesuffix(".tar")
        try:
            return take_if_free(folder, timeout_seconds=timeout_seconds, on_lost=on_lost)
        except FileNotFoundError:  # the last one is tidying up
            return None

    def forget_claims(self, but: str) -> None:
        """Removes what is left of all leases but one."""
        for claims in (self.path / CLAIMS).iterdir():
            if claims.name != but:
                shutil.rmtree(claims, ignore_errors=True)

    def write_manifest(self, content: bytes) -> None:
        """Makes the set a finished one."""
        write_file(self.path / MANIFEST, content)
        self._remove_drafts("*.tar", "*.json", "*.idx")  # of processes that were killed

    def write_parts(self, name: str, parts: Iterable[bytes]) -> None:
        """Writes a file of the set, whole or not at all."""
        write_file(self.path / name, parts)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Some bytes of a finished shard; fewer where it is shorter."""
        with open(self.path / name, "rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def any_record(self) -> dict[str, Any] | None:
        """The record of one of the finished shards; None if there is none."""
        try:
            names = sorted(path.name for path in self.path.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return None
        found = (self.settled(f"{name.removesuffix('.json')}.tar") for name in names if name != MANIFEST)
        return next((record for record in found if record is not None), None)

    def withdraw_manifest(self) -> None:
        """Makes it none."""
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _remove_drafts(self, *names: str) -> None:
        for name in names:
            for draft in self.path.glob(f"{draft_prefix(name)}*.part"):
                draft.unlink(missing_ok=True)


def record_name(name: str) -> str:
    """00000.tar -> 00000.json"""
    return f"{name.removesuffix('.tar')}.json"


def draft_prefix(name: str) -> str:
    """How names begin of what may become this shard."""
    return f".{name}."


def named_after(name: str, record: Mapping[str, Any]) -> str:
    """Where a tar stands until its record is committed: its name follows from the record.

    Raises DataError where the record, which another process or person may have written, has no checksum.
    """
    checksum = accepted(record.get("sha256"), SHA256, f"{record_name(name)} of a set of latents", DataError)
    return f"{draft_prefix(name)}{checksum}.part"


def encoded(record: Mapping[str, Any]) -> bytes:
    """The bytes of a shard's json."""
    return json.dumps(record, indent=1).encode("utf-8")


def decoded(content: bytes) -> dict[str, Any] | None:
    """What `encoded` made; None of anything else."""
    try:
        return parsed_object(content)
    except ValueError:
        return None

"""Leases in an object store, which has no modification times to touch and no clock to ask: see `distributed.lease`.

    URL/.claims/00012.00000003.json     the third holder of shard 00012: host, process, a token, a count of beats

Whoever creates the object with the next number holds the lease; a store lets one process do that. A holder writes its
object anew as a sign of life. Others watch: one whose object has not changed for the whole timeout, by the watcher's own
clock, has left, and one that died on this host has left at once. A released lease is removed, so that numbers may come
again: the token tells whose one is.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from ldmscale.errors import DataError
from ldmscale.storage.lease import Holder, LeaseLostError, holder_of, this_process
from ldmscale.storage.plain_values import parsed_object
from ldmscale.storage.store_folder import StoreFolder

log = logging.getLogger(__name__)

_NAME = re.compile(r"([^/\\.][^/\\]*)\.([0-9]{8})\.json")
_LOOK_SECONDS = 1.0  # a look at all leases serves for so long


@dataclass(frozen=True)
class _Seen:
    """The newest lease of a name: its object's version, and when this process first saw that."""

    number: int
    version: str
    since: float
    holder: Holder | None = None  # once its object was read


class StoreLease:
    """A lease that this process holds, made by `StoreLeases.take_if_free`. Its heartbeat runs until `release`."""

    def __init__(
        self, folder: StoreFolder, name: str, me: Holder, token: str, timeout_seconds: float,
        on_lost: Callable[[], None],
    ) -> None:  # fmt: skip
        self.name, self.number = name, me.number
        self._folder, self._me, self._token = folder, me, token
        self._timeout, self._on_lost = timeout_seconds, on_lost
        self._beats, self._ended = 0, threading.Event()
        self._writing = threading.Lock()  # a beat must not bring a released lease back
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def start(self) -> StoreLease:
        self._thread.start()
        return self

    def content(self) -> bytes:
        """What its object holds now."""
        return json.dumps(asdict(self._me) | {"token": self._token, "beats": self._beats}).encode()

    def held(self) -> bool:
        """Whether no other process has taken it over. Asks the store."""
        if self._ended.is_set() or self._folder.size(place(self.name, self.number + 1)) is not None:
            return False
        found = self._folder.read(place(self.name, self.number))
        try:
            return found is not None and parsed_object(found).get("token") == self._token
        except ValueError:
            return False  # not what this process wrote

    def check(self) -> None:
        """Raise LeaseLostError if another process has taken it over."""
        if not self.held():
            raise LeaseLostError(
                f"{self._folder.url}/{self.name} was claimed by another process, or given free by this one: nothing more "
                "is written there"
            )

    def release(self) -> None:
        """Give it free at once; whoever comes next need not wait. A store that does not answer keeps it for its time."""
        if self._ended.is_set():
            return
        with suppress(DataError), self._writing:
            held = self.held()
            self._ended.set()
            if held:
                self._folder.remove(place(self.name, self.number))
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(self._timeout / 6):
            # A store that does not answer: the next beat may find it.
            with suppress(DataError), self._writing:
                if not self.held():
                    if not self._ended.is_set():
                        self._on_lost()
                    return
                self._beats += 1
                self._folder.write(place(self.name, self.number), self.content())


class StoreLeases:
    """The leases below a folder of a store, as this process has seen them. Methods raise StoreError as `StoreFolder`."""

    def __init__(self, folder: StoreFolder, within: str) -> None:
        self._set, self._within = folder, within
        self._folder = StoreFolder(f"{folder.url}/{within}", folder.storage)
        self._seen: dict[str, _Seen] = {}
        self._numbers: dict[str, list[int]] = {}
        self._looked = float("-inf")

    def take_if_free(
        self, name: str, *, timeout_seconds: float, on_lost: Callable[[], None] = lambda: None
    ) -> StoreLease | None:
        """The lease of `name`; None if another process holds it or may do so. Never waits for others."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look()
        before = self._seen.get(name)
        if before is not None and not self._left(name, before, timeout_seconds):
            return None
        before = self._seen.get(name)  # with its holder, now
        number = 1 if before is None else before.number + 1
        token = secrets.token_hex(8)
        lease = StoreLease(self._folder, name, this_process(number), token, timeout_seconds, on_lost)
        made = self._folder.create(place(name, number), lease.content())
        self._look()
        # What was known may have been old: others may have come and gone, and taken a higher number.
        newest = self._seen.get(name)
        if not made or newest is None or newest.number != number:
            if made:
                self._folder.remove(place(name, number))
            return None
        if before is not None and before.holder is not None:
            left = replace(before.holder, age_seconds=self._looked - before.since)
            log.warning("shard %s of %s was left by %s: taken over", name, self._set.url, left.told())
        # In this order: as long as a lease is there the next one is, too, by which its holder sees that it is over.
        self._folder.remove(*(place(name, old) for old in self._numbers[name] if old < number))
        return lease.start()

    def forget(self, but: str) -> None:
        """Removes all leases but those of one name: nothing is left to be claimed."""
        self._look()
        for name, numbers in self._numbers.items():
            if name != but:
                self._folder.remove(*(place(name, number) for number in numbers))

    def _look(self) -> None:
        found = self._set.below(self._within)
        self._looked = time.monotonic()
        self._numbers = {}
        for entry in found:
            if parts := _NAME.fullmatch(entry):
                self._numbers.setdefault(parts[1], []).append(int(parts[2]))
        seen = {}
        for name, numbers in self._numbers.items():
            numbers.sort()
            version = found[place(name, numbers[-1])].version
            was = self._seen.get(name)
            same = was is not None and (was.number, was.version) == (numbers[-1], version)
            seen[name] = was if was is not None and same else _Seen(numbers[-1], version, self._looked)
        self._seen = seen

    def _left(self, name: str, seen: _Seen, timeout_seconds: float) -> bool:
        if seen.holder is None:
            content = self._folder.read(place(name, seen.number))
            if content is None:
                return False  # given free meanwhile: the next look tells
            source = f"{self._folder.url}/{place(name, seen.number)}"
            seen = replace(seen, holder=replace(holder_of(content, source), number=seen.number))
            self._seen[name] = seen
        assert seen.holder is not None
        return seen.holder.dead or self._looked - seen.since > timeout_seconds


def place(name: str, number: int) -> str:
    """Name of a lease's object."""
    return f"{name}.{number:08d}.json"

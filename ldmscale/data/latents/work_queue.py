"""Which shard to make next, agreed on by processes that know nothing of each other but a folder, or a URL.

Each shard has a lease of its own, in FOLDER/.claims/. A claim of a process that died on this host is taken over at
once, of one on another host when its time is over without a sign of life.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ldmscale.data.latents.store import LatentPlace, place_of
from ldmscale.storage.lease import Lease
from ldmscale.storage.store_lease import StoreLease
from ldmscale.waiting import Wait

_SET = "set"


@dataclass(frozen=True)
class Claim:
    """A shard that this process alone makes, as long as it holds the lease."""

    number: int
    name: str
    place: LatentPlace
    lease: Lease | StoreLease


class Claims:
    """The shards of a set that are not known to be finished.

    Args:
        folder: of the set; on a file system that all processes share, or in an object store.
        names: file names of all shards.
        finished: whether a shard, by its number, is finished. May raise; asked again before a claim counts.
        timeout_seconds: without a sign of life, after which a claim of another host is void.
        first: where to begin, so that processes started together do not all ask for the same.
    """

    def __init__(
        self,
        folder: Path | LatentPlace,
        names: Sequence[str],
        finished: Callable[[int], bool],
        *,
        timeout_seconds: float = 120.0,
        first: int = 0,
    ) -> None:
        self.place, self.names = place_of(folder), names
        self._finished, self._timeout = finished, timeout_seconds
        self._left = deque(range(len(names)))
        self._left.rotate(-first)

    def next(self, on_lost: Callable[[int], None]) -> Claim | None:
        """The next shard that nobody makes; None if the rest is finished or held by others.

        `on_lost` is called, from a thread, with the number of a shard that another process has taken over.
        """
        for _ in range(len(self._left)):
            number = self._left.popleft()
            if self._finished(number):
                continue
            self._left.append(number)
            lease = self.place.claim(self.names[number], self._timeout, partial(on_lost, number))
            if lease is None:
                continue
            if self._finished(number):  # between the question and the claim
                lease.release()
                self._left.remove(number)
                continue
            return self._settled(number, lease)
        return None

    def _settled(self, number: int, lease: Lease | StoreLease) -> Claim:
        # The set is changing: a manifest that is there is true only as long as nobody makes a shard.
        self.place.withdraw_manifest()
        return Claim(number, self.names[number], self.place, lease)

    @property
    def unfinished(self) -> int:
        """How many shards are not known to be finished."""
        return len(self._left)

    def all_finished(self) -> bool:
        """Whether there is nothing left to make, by anyone."""
        while self._left and self._finished(self._left[0]):
            self._left.popleft()
        return not self._left

    def once(self, done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Has one process `do` what follows the last shard; returns when it is `done`."""
        # No time limit: the claim of one that died runs out, and then this process does it.
        wait = Wait(f"another process, which completes the manifest of {self.place}", limit_seconds=math.inf)
        while not done():
            lease = self.place.claim(_SET, self._timeout, lambda: None)
            if lease is None:
                wait.turn(self.place.poll_seconds)
                continue
            try:
                if not done():
                    do()
            finally:
                lease.release()
            self.place.forget_claims(but=_SET)

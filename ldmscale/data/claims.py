"""Which shard to make next, agreed on by processes that know nothing of each other but a folder.

Each shard has a lease of its own, in FOLDER/.claims/NAME. A claim of a process that died on this host is taken over at
once, of one on another host when its time is over without a sign of life.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ldmscale.distributed.lease import Lease, take_if_free

log = logging.getLogger(__name__)

_FOLDER, _SET = ".claims", "set"
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Claim:
    """A shard that this process alone makes, as long as it holds the lease."""

    number: int
    path: Path
    lease: Lease


class Claims:
    """The shards of a set that are not known to be finished.

    Args:
        folder: of the set; on a file system that all processes share.
        names: file names of all shards.
        finished: whether a shard, by its number, is finished. May raise; asked again before a claim counts.
        timeout_seconds: without a sign of life, after which a claim of another host is void.
        first: where to begin, so that processes started together do not all ask for the same.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        finished: Callable[[int], bool],
        *,
        timeout_seconds: float = 120.0,
        first: int = 0,
    ) -> None:
        self.folder, self.names = folder, names
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
            claims = self.folder / _FOLDER / Path(self.names[number]).stem
            try:
                lease = take_if_free(claims, timeout_seconds=self._timeout, on_lost=partial(on_lost, number))
            except FileNotFoundError:  # the last one is tidying up
                continue
            if lease is None:
                continue
            if self._finished(number):  # between the question and the claim
                lease.release()
                self._left.remove(number)
                continue
            return self._settled(number, lease)
        return None

    def _settled(self, number: int, lease: Lease) -> Claim:
        # The set is changing: a manifest that is there is true only as long as nobody makes a shard.
        (self.folder / "manifest.json").unlink(missing_ok=True)
        return Claim(number, self.folder / self.names[number], lease)

    def all_finished(self) -> bool:
        """Whether there is nothing left to make, by anyone."""
        while self._left and self._finished(self._left[0]):
            self._left.popleft()
        return not self._left

    def once(self, done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Has one process `do` what follows the last shard; returns when it is `done`."""
        while not done():
            lease = take_if_free(self.folder / _FOLDER / _SET, timeout_seconds=self._timeout)
            if lease is None:
                time.sleep(_POLL_SECONDS)
                continue
            try:
                if not done():
                    do()
            finally:
                lease.release()
            for claims in (self.folder / _FOLDER).iterdir():
                if claims.name != _SET:
                    shutil.rmtree(claims, ignore_errors=True)

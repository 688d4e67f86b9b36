"""Lines that a file of a running job could not take: a full disk or a file system that stumbles must not end a run of weeks."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


class LostLines:
    """Counts the lines that a file did not take. The first loss is logged, then each doubling of their number.

    Attributes:
        count: lines lost so far.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def add(self, error: OSError) -> None:
        self.count += 1
        if self.count & (self.count - 1) == 0:
            log.error(
                "%s takes no lines (%s): %d lost so far, the run goes on; free room there",
                self.path,
                error.strerror or error,
                self.count,
            )


def append_whole(handle: int, line: bytes) -> None:
    """Append a line to a file that no other process writes, whole or not at all.

    Raises:
        OSError: if the file did not take it; then nothing of it is left.
    """
    before = os.fstat(handle).st_size
    try:
        left = memoryview(line)
        while left:  # a disk that fills up takes a part
            left = left[os.write(handle, left) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, before)
        raise

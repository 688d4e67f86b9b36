"""The ledger of data that a run did not use: a json line for every sample skipped, with shard and reason."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ldmscale import messages, redact
from ldmscale.storage.given_files import lines_of, read_given
from ldmscale.storage.lost_lines import LostLines
from ldmscale.storage.plain_values import parsed_object

log = logging.getLogger(__name__)

FREE_FAULTS = 20
"""Unusable samples that are allowed before their share counts against data.max_bad_share."""

_LOGGED = 10  # skipped samples with a line of their own in the log of a process; the ledger has all


class Ledger:
    """Appends to `data_ledger.jsonl`.

    Every line is one `write` to a file opened with O_APPEND, so ranks and their workers may share a file on a
    local disk. (NFS does not promise that appends of several nodes do not overwrite each other; lines are far
    apart in time.) A resume repeats the lines of samples that it reads again; `position` tells them apart.

    Args:
        path: the file, made when the first line comes; None only logs.
        rank: the rank that reads.
    """

    def __init__(self, path: str | os.PathLike[str] | None, rank: int = 0) -> None:
        self.path = None if path is None else Path(path)
        self.rank = rank
        self.skipped = 0  # by this process
        self.lost = LostLines(self.path or Path("the ledger"))

    def record(self, *, shard: str, key: str, reason: str, position: int | None) -> None:
        """Writes down a sample (or, with an empty key, a shard) that was skipped, and why.

        A line that the disk does not take is lost: logged and counted in `lost`.
        """
        self.skipped += 1
        if self.skipped <= _LOGGED:
            # Names in tars may be no text at all, and log files take only text.
            log.warning("skipped %s", messages.name(f"{key or 'all'} of {shard}: {reason}"))
        elif self.skipped & (self.skipped - 1) == 0:
            log.warning("%d samples skipped so far; %s names them", self.skipped, self.path or "no ledger")
        if self.path is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        entry = {
            "shard": redact.text(shard),
            "key": messages.name(key),
            "reason": messages.name(reason),
            "position": position,
            "rank": self.rank,
            "time": now,
        }
        line = (json.dumps(entry) + "\n").encode("utf-8")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            self.lost.add(error)


def read_ledger(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the ledger's entries, oldest first. An absent file has none; a line cut short is left out."""
    if not os.path.exists(path):
        return []
    entries = []
    text = read_given(Path(path), "move it away, and a new one is begun").decode("utf-8", "replace")
    for line in lines_of(text):
        try:
            entries.append(parsed_object(line))
        except ValueError:
            log.warning("%s has a line that is no json: %.80s", path, line)
    return entries

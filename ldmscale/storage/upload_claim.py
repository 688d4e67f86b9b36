"""Who may upload to a URL: each start of a run claims it by a number there, and the highest number has it.

    URL/starts/00000003.json     the third start: host, process, run folder

The lease of a run folder says nothing of another folder on another host, from which a start that was given up may wake up
and go on uploading. So each start looks here before it touches a checkpoint in the store, and ends where a later one came.
Where the store can create an object under a condition (S3, files), two starts never get the same number; elsewhere each
reads back what it wrote. What no store can do is to look and to write in one move: a process that is stopped for long just
between the two may still finish the one object that it was about to write.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import socket
import time
from contextlib import suppress
from typing import Any

from ldmscale.storage.lease import LeaseLostError
from ldmscale.storage.object_store import create

_NAME = re.compile(r"(\d{8})\.json")
_TRIES = 20
_REFUSALS = 3


class Claim:
    """One start's claim on `folder` of a file system of fsspec. Methods raise what the store's library raises."""

    def __init__(self, filesystem: Any, folder: str, owner: str) -> None:
        """Claim it. `owner` tells people what claims it: a run folder."""
        self._fs, self._folder = filesystem, folder
        about = {"host": socket.gethostname(), "process": os.getpid(), "run": owner}
        about |= {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": secrets.token_hex(8)}
        content = json.dumps(about).encode()
        filesystem.makedirs(folder, exist_ok=True)
        refusals = 0  # of a number that nobody has
        for _ in range(_TRIES):
            self.number = max(self._numbers(), default=0) + 1
            try:
                if create(filesystem, self._place(self.number), content):
                    break
            except Exception:  # each store's library has its own
                refusals += 1
                if refusals > _REFUSALS:
                    raise
            time.sleep(random.uniform(0.05, 0.4))  # another start is at it
        else:
            raise OSError(f"{folder}: other starts were faster {_TRIES} times")
        for number in self._numbers():
            if number < self.number - 1:
                with suppress(Exception):  # whoever else tidies up
                    filesystem.rm_file(self._place(number))

    def check(self) -> None:
        """Raise LeaseLostError if a later start has claimed it."""
        if (latest := max(self._numbers(), default=0)) > self.number:
            told = json.loads(self._fs.cat_file(self._place(latest)))
            raise LeaseLostError(
                f"{self._folder.rpartition('/')[0]} was claimed by a later start (process {told['process']} on "
                f"{told['host']}, since {told['since']}, of {told['run']}): this one uploads nothing more and ends. Two "
                "runs must not share a checkpoint.url"
            )

    def _numbers(self) -> list[int]:
        self._fs.invalidate_cache()
        try:
            names = [str(path).rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False)]
        except FileNotFoundError:
            return []
        return [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]

    def _place(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"

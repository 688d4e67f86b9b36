"""Which start of a run may upload to a URL: each start claims it by a number, and the highest number holds it.

    URL/starts/00000003.json     the third start: host, process, run folder

The lease of a run folder does not cover another folder on another host, from which a start that was given up may resume
and upload. So each start checks here before it touches a checkpoint in the store, and ends where a later one came.
Two starts never get the same number (see `Storage.create`). No store can check and write in one request: a process that
is suspended between the two may still finish the one object that it was about to write.
"""

from __future__ import annotations

import json
import random
import re
import secrets
import time
from contextlib import suppress

from ldmscale.errors import DataError
from ldmscale.storage.lease import LeaseLostError, this_process
from ldmscale.storage.object_store import StoreError
from ldmscale.storage.plain_values import parsed_object
from ldmscale.storage.store_folder import StoreFolder

_NAME = re.compile(r"(\d{8})\.json")
_TRIES = 20


class Claim:
    """One start's claim on a folder of a store. Methods raise StoreError as those of `StoreFolder`."""

    def __init__(self, folder: StoreFolder, owner: str) -> None:
        """Claims the folder. `owner` names the claiming run folder for messages."""
        self._folder = folder
        folder.make()
        for _ in range(_TRIES):
            self.number = max(self._numbers(), default=0) + 1
            me = this_process(self.number)
            about = {"host": me.host, "process": me.pid, "run": owner, "since": me.since}
            about["token"] = secrets.token_hex(8)
            if folder.create(_name(self.number), json.dumps(about).encode()):
                break
            time.sleep(random.uniform(0.05, 0.4))  # another start claims it at this moment
        else:
            raise StoreError(
                f"{folder.url}: other starts were faster {_TRIES} times; let only one start use it"
            )
        with suppress(DataError):  # other starts remove old claims, too
            folder.remove(*(_name(number) for number in self._numbers() if number < self.number - 1))

    def check(self) -> None:
        """Raise LeaseLostError if a later start has claimed it."""
        if (latest := max(self._numbers(), default=0)) > self.number:
            content = self._folder.read(_name(latest))
            try:
                by = parsed_object(content or b"{}")
            except ValueError:
                by = {}  # whatever it holds, its number is the later one
            raise LeaseLostError(
                f"{self._folder.url.rpartition('/')[0]} was claimed by a later start (process {by.get('process')} on "
                f"{by.get('host')}, since {by.get('since')}, of {by.get('run')}): this one uploads nothing more and ends. "
                "Two runs must not share a checkpoint.url"
            )

    def _numbers(self) -> list[int]:
        return [int(found[1]) for name in self._folder.names() if (found := _NAME.fullmatch(name))]


def _name(number: int) -> str:
    return f"{number:08d}.json"

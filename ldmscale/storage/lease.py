"""Who may write to a folder: a lease with a heartbeat and a fencing number, on local and shared file systems.

    FOLDER/lease_00000007.json     the seventh holder: host, process, since when; its modification time beats

Whoever creates the file with the next number holds the lease, and creating it succeeds for one process only.
So a take-over needs no lock and no message: the holder before finds a higher number, or the mark that the
taker left in its file, and must write no more. Ages are differences between modification times of one file
system; clocks of hosts are never compared. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ldmscale.errors import DataError, LdmscaleError
from ldmscale.storage.atomic import create_file, write_json
from ldmscale.storage.plain_values import Count, Flag, checked, parsed_object
from ldmscale.waiting import Wait

log = logging.getLogger(__name__)

_NAME = re.compile(r"lease_(\d{8})\.json")
_POLL_SECONDS = 0.25
_LONGEST = 1 << 16  # bytes of a lease's file that are read
_DESCRIBED = ("host", "pid", "since", "processes", "started", "released")


class LeaseHeldError(LdmscaleError):
    """Another process holds the folder."""


class LeaseLostError(LdmscaleError):
    """Another process has taken the folder over: this one must write no more."""


@dataclass(frozen=True)
class Holder:
    """The newest holder of a folder, as its file tells, and how long ago it showed life."""

    number: int
    host: str = "?"
    pid: Count = 0
    since: str = "?"  # local time of its host
    processes: str = ""  # names the space of process numbers that `pid` belongs to
    started: str = ""  # of the process, so that a number that is used again is no life
    released: Flag = False
    beat: float = 0.0  # modification time of its file
    age_seconds: float = 0.0  # since its last beat

    def told(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}, last sign of life {self.age_seconds:.0f} s ago"

    @property
    def dead(self) -> bool:
        """Whether it certainly does not run any more; False where that cannot be known from here."""
        return self.processes == _process_space() != "" and _start_of(self.pid) != self.started

    def left(self, timeout_seconds: float) -> bool:
        """Whether it may be followed: it released the folder, has died, or showed no life for so long."""
        return self.released or self.dead or self.age_seconds > timeout_seconds


def this_process(number: int) -> Holder:
    """This process as the holder with a number, from now on."""
    return Holder(
        number,
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        processes=_process_space(),
        started=_start_of(os.getpid()),
    )


class Lease:
    """A lease that this process holds, made by `take`. Its heartbeat runs in a thread until `release`."""

    def __init__(self, path: Path, number: int, timeout_seconds: float, on_lost: Callable[[], None]) -> None:
        self.path, self.number = path, number
        self._timeout, self._on_lost = timeout_seconds, on_lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether no other process has taken the folder over. Looks at the disk."""
        return not self._ended.is_set() and _is_held(self.path.parent, self.number)

    def check(self) -> None:
        """Raise LeaseLostError if another process has taken the folder over."""
        if self._ended.is_set():
            raise LeaseLostError(f"{self.path.parent} was given free by this process")
        check_held(self.path.parent, self.number)

    def release(self) -> None:
        """Give the folder free at once; whoever comes next need not wait."""
        if not self._ended.is_set():
            held = self.held()
            self._ended.set()
            if held:
                with suppress(OSError, ValueError):
                    _mark(self.path, "released")

    def _beat(self) -> None:
        while not self._ended.wait(self._timeout / 6):
            with suppress(OSError):  # a store that does not answer: the next beat may find it
                if not self.held():
                    if not self._ended.is_set():
                        self._on_lost()
                    return
                os.utime(self.path)


def take(
    folder: Path,
    *,
    timeout_seconds: float = 60.0,
    wait_seconds: float = 0.0,
    on_lost: Callable[[], None] = lambda: None,
) -> Lease:
    """Hold `folder`, once nobody else does. `Lease.number` grows with every holder.

    A holder that released it, that died on this host, or that showed no life for `timeout_seconds` is
    followed at once. One that may have died on another host is watched until it shows life or that time is
    over. `on_lost` is called from a thread if another process takes over, which means that this one showed no
    life for so long.

    Raises LeaseHeldError, naming the holder, if a live one does not release it within `wait_seconds`, and
    OSError if the folder cannot be written, and DataError if the newest holder's file is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    wait = Wait(
        lambda: _watched(folder, holder, timeout_seconds), limit_seconds=timeout_seconds + wait_seconds + 60.0
    )
    first: Holder | None = None
    while True:
        holder = newest_holder(folder)
        if holder is None or holder.left(timeout_seconds):
            if (lease := _follow(folder, holder, timeout_seconds, on_lost)) is not None:
                return lease
            first = None  # another was faster: look at it
            continue
        local = holder.processes == _process_space() != ""
        first = first or holder
        alive = local or (holder.number, holder.beat) != (first.number, first.beat)
        if alive and time.monotonic() >= deadline:
            raise LeaseHeldError(f"{folder} is in use by {holder.told()}")
        wait.turn(_POLL_SECONDS)


def _watched(folder: Path, holder: Holder | None, timeout_seconds: float) -> str:
    by = "another process" if holder is None else holder.told()
    return f"{folder}, held by {by}; if it shows no life for {timeout_seconds:g} s, it has ended and the folder is free"


def take_if_free(
    folder: Path, *, timeout_seconds: float = 60.0, on_lost: Callable[[], None] = lambda: None
) -> Lease | None:
    """As `take`, but never waits: None if another process holds the folder or may do so."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = newest_holder(folder)
    if holder is not None and not holder.left(timeout_seconds):
        return None
    return _follow(folder, holder, timeout_seconds, on_lost)


def _follow(
    folder: Path, holder: Holder | None, timeout_seconds: float, on_lost: Callable[[], None]
) -> Lease | None:
    """The lease after this holder's, who has left; None if another process was faster."""
    number = 1 if holder is None else holder.number + 1
    if holder is not None and not holder.released:
        log.warning("the folder %s was left by %s: taken over", folder, holder.told())
    if (path := _create(folder, number)) is None:
        return None
    _tidy(folder, number)
    return Lease(path, number, timeout_seconds, on_lost)


def check_held(folder: Path, number: int) -> None:
    """Raise LeaseLostError if the folder has a later holder than this one: for processes that belong to a holder, too."""
    if not _is_held(folder, number):
        raise LeaseLostError(
            f"{folder} has been taken over by {_told(folder)}: this process (start {number}) writes nothing more there"
        )


def _is_held(folder: Path, number: int) -> bool:
    try:
        if _path(folder, number + 1).exists():
            return False
        # Opening makes a network file system ask its server, which looking for a name may not.
        return not parsed_object(_path(folder, number).read_bytes()).get("taken_over", False)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # a store that does not answer has given the folder to nobody


def newest_holder(folder: Path) -> Holder | None:
    """Who holds or last held a folder; None if nobody ever did."""
    numbers = _numbers(folder)
    if not numbers:
        return None
    number = max(numbers)
    path = _path(folder, number)
    try:
        with open(path, "rb") as file:
            beat = os.fstat(file.fileno()).st_mtime
            content = file.read(_LONGEST)
        with tempfile.TemporaryFile(dir=folder) as probe:  # the file system's own clock
            age = os.fstat(probe.fileno()).st_mtime - beat
    except FileNotFoundError:
        return Holder(number)
    if not content:
        return Holder(number)  # its file is being made
    known = holder_of(content, path)
    return replace(known, number=number, beat=beat, age_seconds=max(0.0, age))


def holder_of(content: bytes, source: object) -> Holder:
    """The holder whom the content of a lease describes. Raises DataError where it describes none."""
    try:
        values = parsed_object(content)
        known = checked(Holder, {"number": 0, **{key: values[key] for key in _DESCRIBED if key in values}})
    except ValueError as error:
        raise DataError(
            f"the lease {source} is damaged ({error}): make sure that no process uses its folder, delete it, and start again"
        ) from error
    return known


def _numbers(folder: Path) -> list[int]:
    return [int(found[1]) for path in folder.glob("lease_*.json") if (found := _NAME.fullmatch(path.name))]


def _path(folder: Path, number: int) -> Path:
    return folder / f"lease_{number:08d}.json"


def _told(folder: Path) -> str:
    try:
        holder = newest_holder(folder)
    except DataError:
        holder = None
    return "another process" if holder is None else holder.told()


def _create(folder: Path, number: int) -> Path | None:
    """The lease file with this number, or None if another process made it."""
    path = _path(folder, number)
    return path if create_file(path, json.dumps(asdict(this_process(number))).encode()) else None


def _tidy(folder: Path, number: int) -> None:
    """Tell the holder before, and forget those before it."""
    for other in _numbers(folder):
        with suppress(OSError, ValueError):
            if other < number - 1:
                _path(folder, other).unlink()
            elif other == number - 1:
                _mark(_path(folder, other), "taken_over")


def _mark(path: Path, what: str) -> None:
    """Add a note to a lease file, in one move."""
    write_json(path, parsed_object(path.read_bytes()) | {what: True}, indent=None, durable=False)


def _process_space() -> str:
    """Names this boot of this host and its space of process numbers; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process began, in ticks since the boot; empty if it is gone, or dead and nobody waited for it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]

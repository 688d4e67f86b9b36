"""Waits that log their cause, obey a stop and end: the one mechanism for everything that may take longer than 10 s.

`Wait` is for loops that look whether something has happened, `finished` for programs. `announced` is for a call that blocks
by itself and has a limit of its own. All log the cause after 10 s and then once a minute. The first two also end within a
second of a stop request, by StoppedEarlyError, and at their time limit, by WaitTimeoutError.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import IO

from ldmscale.errors import LdmscaleError, StoppedEarlyError

log = logging.getLogger(__name__)

SAY_AFTER_SECONDS = 10.0
SAY_AGAIN_SECONDS = 60.0
_LONGEST_TURN = 0.5  # seconds between two looks at the stop request
_MONITOR_SECONDS = 1.0

StopReason = Callable[[], "str | None"]
"""Why this process was asked to stop; None if it was not."""


class WaitTimeoutError(LdmscaleError):
    """What was waited for did not come within the time limit."""


_stop_reason: StopReason | None = None
_stoppable: ContextVar[bool] = ContextVar("stoppable", default=False)
_announced: dict[object, tuple[float, str]] = {}  # since when this process waits, and for what
_monitor_of: int | None = None  # the process whose monitor runs; a fork has none


def obey(reason: StopReason | None) -> None:
    """Give the stop request that waits of this process look at; None: there is none any more."""
    global _stop_reason
    _stop_reason = reason


def stop_reason() -> str | None:
    """Why this process was asked to stop; None if it was not, or takes no signals of its own."""
    return None if _stop_reason is None else _stop_reason()


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, requests to object stores of this thread end at a stop request. Outside they go on: a last save needs them."""
    token = _stoppable.set(True)
    try:
        yield
    finally:
        _stoppable.reset(token)


def make_stoppable() -> None:
    """Put the rest of this thread inside `stoppable`; the initializer of a pool of threads."""
    _stoppable.set(True)


def is_stoppable() -> bool:
    """Whether this thread is inside `stoppable`."""
    return _stoppable.get()


class Wait:
    """One wait. Call `turn` between two looks at what is waited for.

    Args:
        cause: what is waited for, and what to look at; completes "waiting for 10 s: ...". A function is called only when the
            cause is logged.
        limit_seconds: the time after which `turn` raises WaitTimeoutError; inf only where something else ends the wait.
        remedy: what to do at the time limit.
        obeys_stop: whether `turn` raises StoppedEarlyError after a stop request.
        grace_seconds: how long the wait goes on after a stop request: what comes within that time is still taken.
    """

    def __init__(
        self,
        cause: str | Callable[[], str],
        *,
        limit_seconds: float,
        remedy: str = "",
        obeys_stop: bool = True,
        grace_seconds: float = 0.0,
    ) -> None:
        self._cause, self._limit, self._remedy = cause, limit_seconds, remedy
        self._obeys_stop, self._grace = obeys_stop, grace_seconds
        self._began = time.monotonic()
        self._next_line = SAY_AFTER_SECONDS
        self._stop_seen = math.inf

    @property
    def seconds(self) -> float:
        """How long the wait has lasted."""
        return time.monotonic() - self._began

    def turn(self, seconds: float = _LONGEST_TURN) -> None:
        """Sleep for `seconds`, then return for the next look. Raises StoppedEarlyError and WaitTimeoutError."""
        end = time.monotonic() + seconds
        while True:
            self.check()
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, _LONGEST_TURN, max(0.01, self._limit - self.seconds)))

    def check(self) -> None:
        """As `turn`, without sleeping: for loops whose look itself takes time."""
        waited = self.seconds
        if waited >= self._next_line:
            self._next_line = waited + SAY_AGAIN_SECONDS
            log.warning("waiting for %.0f s: %s", waited, self._words())
        if self._obeys_stop and (reason := stop_reason()) is not None:
            self._stop_seen = min(self._stop_seen, time.monotonic())
            if time.monotonic() - self._stop_seen >= self._grace:
                raise StoppedEarlyError(f"stopped by {reason} while waiting: {self._words()}", shared=False)
        if waited >= self._limit:
            raise WaitTimeoutError(
                "; ".join(filter(None, [f"gave up after {waited:.0f} s: {self._words()}", self._remedy]))
            )

    def _words(self) -> str:
        return self._cause if isinstance(self._cause, str) else self._cause()


def finished(
    command: Sequence[str], *, cause: str, limit_seconds: float, stdout: int | IO[bytes] = subprocess.PIPE
) -> subprocess.CompletedProcess[bytes]:
    """Run a program without standard input and wait for its end, as `Wait` does; it is killed where the wait ends early.

    Programs that it started itself are killed, too. Raises OSError where it cannot be started.
    """
    wait = Wait(
        cause,
        limit_seconds=limit_seconds,
        remedy="look at what it waits for, and start the same command again",
    )
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            while True:
                try:
                    out, error = process.communicate(timeout=min(_LONGEST_TURN, limit_seconds))
                    return subprocess.CompletedProcess(command, process.returncode, out or b"", error or b"")
                except subprocess.TimeoutExpired:
                    wait.check()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


@contextmanager
def announced(cause: str) -> Iterator[None]:
    """Log `cause` if the block takes longer than 10 s. For calls that block and have a time limit of their own."""
    global _monitor_of
    key = object()
    if _monitor_of != os.getpid():
        _monitor_of = os.getpid()
        _announced.clear()  # of the process that this one was forked from
        threading.Thread(target=_monitor, name="waits", daemon=True).start()
    _announced[key] = (time.monotonic(), cause)
    try:
        yield
    finally:
        _announced.pop(key, None)


def _monitor() -> None:
    lines: dict[object, float] = {}  # when the next line of a wait is due
    while True:
        time.sleep(_MONITOR_SECONDS)
        now, waits = time.monotonic(), dict(_announced)
        lines = {key: due for key, due in lines.items() if key in waits}
        for key, (began, cause) in waits.items():
            if now - began >= lines.get(key, SAY_AFTER_SECONDS):
                lines[key] = now - began + SAY_AGAIN_SECONDS
                log.warning("waiting for %.0f s: %s", now - began, cause)

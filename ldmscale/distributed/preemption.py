"""Stopping in good order: a signal on any one rank sets a flag, and all ranks agree on it at a step boundary.

A run that was stopped so saves a complete checkpoint and ends with exit status 75 (EX_TEMPFAIL of sysexits.h:
"run me again"). This module imports no torch, so that the handlers can be in place before the slow imports
begin.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from ldmscale import waiting
from ldmscale.distributed.environment import watch_launcher

log = logging.getLogger(__name__)

# Exit status of a job that stopped by a signal or a time limit after a complete save: the same command goes
# on from there.
EXIT_STOPPED = 75

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


_STUCK_SECONDS = 4.0  # handlers run between two steps of the interpreter, which are far shorter
_AGAIN_SECONDS = 2.0  # a terminal and a launcher may both send the same Ctrl-C


class StopSignal(KeyboardInterrupt):
    """A stop signal reached a job that has no step boundary to stop at: it ends where it is."""


class Interruptible:
    """Raises `StopSignal` in the main thread when a stop signal comes, while the `with` block runs.

    For the whole of a job: a `StopFlag` takes the signals over for as long as it is installed. What is written appears
    whole or not at all, so a job may end anywhere. A main thread that is inside a library for long, such as one that waits
    for ranks which have ended, gets no exception: the process then ends with status 75. Without effect outside the main
    thread.

    Attributes:
        reason: the signal that came; None: none did.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._when = -math.inf
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._wakeup: tuple[int, int] | None = None  # where signals are written, and where they were before

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            arrivals, sending = os.pipe()
            os.set_blocking(sending, False)
            self._wakeup = sending, signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
            # The signals of a forked process are its own.
            os.register_at_fork(after_in_child=self._forget_wakeup)
            threading.Thread(target=self._end_if_stuck, args=(arrivals,), name="signals", daemon=True).start()
            self._before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a signal further ones are ignored: they would change the exit status of a process that is ending.
        for number, handler in self._before.items():
            if self.reason is not None or signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler if self.reason is None else signal.SIG_IGN)
        if self._wakeup is not None:
            sending, before = self._wakeup
            self._wakeup = None
            signal.set_wakeup_fd(before)
            os.close(sending)

    def _forget_wakeup(self) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)

    def _end_if_stuck(self, arrivals: int) -> None:
        """In a thread of its own: the interpreter writes the number of each signal at once, and calls handlers later."""
        while number := os.read(arrivals, 1):
            if number[0] not in STOP_SIGNALS:
                continue
            time.sleep(_STUCK_SECONDS)
            if self.reason is None and signal.getsignal(number[0]) == self._on_signal:
                name = signal.Signals(number[0]).name
                log.warning(
                    "interrupted by %s inside a library call: this process ends with exit status %d, the same command starts "
                    "it again", name, EXIT_STOPPED,
                )  # fmt: skip
                os._exit(EXIT_STOPPED)
        os.close(arrivals)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process, which ends as if no handler were installed
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if now - self._when > _AGAIN_SECONDS:  # once more, should the first one have been swallowed
            self.reason, self._when = signal.Signals(number).name, now
            raise StopSignal(self.reason)


class StopFlag:
    """Remembers that this rank was asked to stop.

    Signals only set the flag: they may come at any point of a step or a save.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._began = time.monotonic()
        self._limit = (math.inf, "")  # when this rank asks for a stop by itself, and why
        self._before: dict[int, Any] = {}

    def install(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> StopFlag:
        """Take over these signals (main thread only) until `uninstall`, or the end of a `with` block."""
        # First: a launcher that dies from now on is noticed. One that died before has ended this process by its SIGTERM.
        watch_launcher(lambda: self.request("its launcher died"))
        for number in signals:
            self._before[number] = signal.signal(number, self._on_signal)
        waiting.obey(lambda: self.reason if self.requested else None)
        return self

    def uninstall(self) -> None:
        """Give the signals back to the handlers that they had.

        After a signal they are ignored from here on: one more of them, which schedulers like to send, would
        turn the status of a run that stopped in good order into that of a killed one.
        """
        for number, handler in self._before.items():
            signal.signal(number, handler if self._reason is None else signal.SIG_IGN)
        self._before.clear()
        waiting.obey(None)

    def limit(
        self, max_hours: float | None, margin_minutes: float, env: Mapping[str, str] = os.environ
    ) -> None:
        """Ask for a stop `max_hours` after this flag was made, or `margin_minutes` before the end of the
        Slurm allocation, if Slurm tells it (SLURM_JOB_END_TIME).
        """
        limits = [(math.inf, "")]
        if max_hours is not None:
            limits.append((self._began + 3600 * max_hours, f"run.max_hours={max_hours:g} are over"))
        end = env.get("SLURM_JOB_END_TIME", "")
        if end.isdigit() and int(end) > 0:
            left = int(end) - time.time() - 60 * margin_minutes
            limits.append((time.monotonic() + left, "the Slurm allocation ends soon"))
        self._limit = min(limits)

    def __enter__(self) -> StopFlag:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()

    def request(self, reason: str) -> None:
        """Ask for a stop from within, for instance because a time limit is near. The first reason is kept."""
        if self._reason is None:
            self._reason = reason

    @property
    def requested(self) -> bool:
        """True if this rank was asked to stop; the others may not know yet."""
        when, why = self._limit
        if self._reason is None and time.monotonic() >= when:
            self.request(why)
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why this rank was asked to stop, None if it was not."""
        return self._reason

    def agreed(self) -> bool:
        """True on all ranks if any was asked to stop.

        Collective: call it at every step boundary, on every rank.
        """
        from ldmscale.distributed.collectives import any_true

        return any_true(self.requested)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # No logging here: the interrupted code may hold the lock of a log handler.
        self.request(f"signal {signal.Signals(number).name}")

"""Stopping in good order: a signal on any one rank sets a flag, and all ranks agree on it at a step boundary.

A run that was stopped so saves a complete checkpoint and ends with exit status 75 (EX_TEMPFAIL of sysexits.h:
"run me again"). This module imports no torch, so that the handlers can be in place before the slow imports
begin.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from ldmscale import waiting
from ldmscale.distributed.environment import watch_launcher

# Exit status of a job that stopped by a signal or a time limit after a complete save: the same command goes
# on from there.
EXIT_STOPPED = 75

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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

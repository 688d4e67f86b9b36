"""Loading processes: how they begin, how what they make is waited for, how they end.

torch waits for a batch without a limit, reports the death of a process by its number alone, and waits for ever for a batch
that a process could not hand over (no room in /dev/shm, a socket whose path is too long, no descriptor left). Here such
a process ends at once with its reason in the log, a death is an error that names the signal, and a stop request ends
the wait.
"""

from __future__ import annotations

import logging
import math
import multiprocessing.queues
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from ldmscale import redact, waiting
from ldmscale.errors import LdmscaleError
from ldmscale.waiting import Wait

log = logging.getLogger(__name__)

T = TypeVar("T")

TURN_SECONDS = 1.0
"""The `timeout` of a DataLoader whose batches `next_of` takes: how long it waits between two looks."""

PREFETCH = 4
"""Batches that each loading process of a training run prepares ahead."""

_STOP_GRACE_SECONDS = 2.0  # a batch that comes so soon after a stop request still ends its step
_SECONDS_TO_DIE = 0.3  # until the end of a process shows
_TIMED_OUT = "DataLoader timed out"
_CANNOT_HAND_OVER = 74  # exit status of a process, EX_IOERR of sysexits.h
_DIED_OF = {
    signal.SIGKILL: "the kernel kills so when memory is short (`dmesg`, or the job's memory limit): give fewer data.workers or "
    "more memory",
    signal.SIGBUS: "/dev/shm is full: give it more room (docker run --shm-size=8g), or fewer data.workers",
}


def next_of(batches: Iterator[T]) -> T:
    """The next batch of a DataLoader's iterator, whose `timeout` is TURN_SECONDS where it has loading processes.

    Raises LdmscaleError if a loading process died, and StoppedEarlyError if a stop is requested and no batch comes. There
    is no other time limit: during training the watchdog of `safety.step_timeout_minutes` ends a rank that hangs here.
    """
    wait = Wait(
        partial(_cause, batches), limit_seconds=math.inf, obeys_stop=True, grace_seconds=_STOP_GRACE_SECONDS
    )
    while True:
        try:
            with waiting.stoppable():  # where this process reads from a store itself
                return next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            timed_out = str(error).startswith(_TIMED_OUT)
            if not timed_out:  # perhaps a process that dies at this moment, in the middle of handing over
                time.sleep(_SECONDS_TO_DIE)
            if dead := _dead(batches):
                raise LdmscaleError(dead) from error
            if not timed_out:
                raise
        wait.check()


def end(batches: Iterator[Any] | None, *, at_once: bool = False) -> None:
    """End the loading processes; `at_once`: by force, since they may hang in a read that never ends."""
    # Torch stops workers when the last reference goes; after an error the traceback keeps one, and
    # workers forked later would inherit it. So they are stopped by name where torch lets us.
    stop = getattr(batches, "_shutdown_workers", None)
    if stop is None:
        return
    if at_once:
        for worker in getattr(batches, "_workers", ()):
            worker.kill()
    stop()


def end_at_exit(owner: object, batches: Iterator[Any]) -> weakref.finalize[..., Any]:
    """End the loading processes with `owner`, or with this process; `detach` what is returned once they have ended.

    Python ends its children by one TERM, which they ignore, and would wait for them for ever.
    """
    return weakref.finalize(owner, _end_own, os.getpid(), batches)


def _end_own(process: int, batches: Iterator[Any]) -> None:
    if os.getpid() == process:  # a fork has a copy of the owner, and not its children
        end(batches, at_once=True)


def _cause(batches: object) -> str:
    numbers = [str(worker.pid) for worker in getattr(batches, "_workers", ())]
    return (
        f"the next batch, which loading processes {', '.join(numbers)} make; are the shards on a file system or store that "
        "answers"
    )


def _dead(batches: object) -> str:
    """What happened to a loading process that ended; empty if all live."""
    for number, worker in enumerate(getattr(batches, "_workers", ())):
        status = worker.exitcode
        if status is None or status == 0:
            continue
        what = f"loading process {number} (pid {worker.pid}) "
        if status == _CANNOT_HAND_OVER:
            return what + "could not hand over its batch; its error stands above"
        if status > 0:
            return what + f"ended with status {status}; its error stands above"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        hint = _DIED_OF.get(-status)
        return what + f"was killed by {name}" + (f": {hint}" if hint else "")
    thread = getattr(batches, "_pin_memory_thread", None)
    if thread is not None and not thread.is_alive():
        return "the thread that puts batches into page-locked memory has died; its error stands above"
    return ""


def start_of_workers() -> Callable[[int], None]:
    """What a loading process does first: it leaves signals alone, learns which secrets messages must not show, and ends
    if it cannot hand over a batch.
    """
    return partial(_begin_worker, redact.known())


def _begin_worker(secrets: Mapping[str, str], number: int) -> None:
    redact.know(secrets)  # a fork has them already, a process of the fork server does not
    calm_worker(number)
    waiting.obey(None)  # the training process decides
    # The queue's thread only prints what goes wrong, and the batch is never seen again.
    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(_cannot_hand_over))  # noqa: B010


def _cannot_hand_over(error: Exception, batch: object) -> None:
    log.error(
        "a loading process cannot hand over its batch: %s; is there room in /dev/shm (docker run --shm-size=8g), is TMPDIR "
        "short, and is `ulimit -n` high enough",
        error,
    )
    os._exit(_CANNOT_HAND_OVER)


def calm_worker(number: int) -> None:
    """Leaves signals to the training process, which decides when to stop.

    Slurm and terminals signal every process of a job; a worker that died of it would make the training
    process fail before it has saved. TERM is obeyed the second time, for torch ends stuck workers with it.
    """
    seen: list[int] = []

    def on_term(signum: int, frame: object) -> None:
        seen.append(signum)
        if len(seen) > 1:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_term)

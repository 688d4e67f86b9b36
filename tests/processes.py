"""Processes of tests: none outlives the block that started it, and nobody waits for one without a limit.

A test that fails inside `with subprocess.Popen(...)` waits for its process, which may run for ever, and so keeps the
whole suite waiting.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

_SECONDS_TO_DIE = 60.0


@contextmanager
def running(command: Sequence[Any], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process, with all that it starts itself (ranks, workers): killed at the end of the block if it still runs."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill_group(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(OSError):  # what was written to the dead
                    stream.close()


def kill_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads its session, and all of its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=_SECONDS_TO_DIE)


def line_of(process: subprocess.Popen[str], seconds: float = 60.0) -> str:
    """The next line of its output. For processes that write one line and wait: what was read ahead is not looked at."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    assert ready, f"{process.args} said nothing for {seconds:g} s"
    return process.stdout.readline()

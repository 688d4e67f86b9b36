"""Starts jobs through the process of job_host.py, whose imports are paid once."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from processes import kill_group

CHECKOUT = Path(__file__).resolve().parents[1]
# What a job may take on a busy machine: those of these tests take 3 to 20 s on a quiet one.
ANSWER_SECONDS = 300.0


class Host:
    """The process that starts jobs, see job_host.py; the jobs run in the present test's `folder`.

    A job that does not end within the limit fails its test with the stacks of all its processes in the log, and no
    test meets the jobs that another one left behind.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.environment = dict(os.environ)  # what the modules that the process has imported have read
        self._begin()

    def _begin(self) -> None:
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(CHECKOUT),
        }
        self._unread = b""
        self.jobs = 0  # whose statuses were not read yet
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("job_host.py"))],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip

    def close(self) -> None:
        """End the process and all jobs that are left."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(OSError):
            self.process.stdin.close()
        if not self.jobs:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
        kill_group(self.process)
        self.process.stdout.close()

    def clear(self) -> None:
        """After a test: what it left behind is ended, and the next one gets a process that has read nothing."""
        if self.jobs or self.process.poll() is not None:
            self.close()
            self._begin()

    @property
    def log(self) -> str:
        """What the jobs of this test have said."""
        file = self.folder / "log.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    def start(
        self,
        command: list[str],
        keys: Path,
        ranks: int = 2,
        environment: dict[str, str] | None = None,
        beside: bool = False,
    ) -> dict[str, Any]:
        job = {"arguments": command, "ranks": ranks, "folder": str(self.folder), "keys": str(keys)}

        job |= {
            "stdout": str(self.folder / "log.txt"),
            "stderr": str(self.folder / "log.txt"),
            "environment": environment or {},
            "beside": beside,
        }
        self.jobs += 1
        self._ask(job)
        return self._answer(ANSWER_SECONDS)

    def _ask(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(job) + "\n").encode())

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.killpg(self.process.pid, signal.SIGUSR2)  # all of them write their stacks to the log
                time.sleep(3.0)
                pytest.fail(f"no answer of the job for {seconds:g} s:\n{self.log[-12000:]}")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            assert part, f"the host of the jobs has died:\n{self.log[-6000:]}"
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ended(self, seconds: float = ANSWER_SECONDS) -> int:
        """The status of the job that was started last, once it has ended."""
        status = int(self._answer(seconds)["status"])
        self.jobs -= 1
        return status

    def run(self, command: list[str], keys: Path, **others: Any) -> int:
        """The status of a job that was waited for."""
        self.start(command, keys, **others)
        return self.ended()

    def completed(
        self, arguments: list[str], folder: Path, ranks: int | None, timeout: float, given: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run a job as `subprocess.run` would, on `ranks` forked ranks or (None) in one process without a launcher."""
        with tempfile.TemporaryDirectory(prefix="ldmscale_job_") as name:
            streams = {part: Path(name, part) for part in ("stdin", "stdout", "stderr")}
            for part, file in streams.items():
                file.write_text(given or "" if part == "stdin" else "")
            job = {
                "arguments": arguments,
                "ranks": ranks,
                "folder": str(folder),
                "environment": {},
                "beside": False,
            }
            job |= {part: str(file) for part, file in streams.items()}
            self.jobs += 1
            self._ask(job)
            if ranks is not None:
                self._answer(timeout)
            status = self.ended(timeout)
            out, err = (streams[part].read_text(errors="replace") for part in ("stdout", "stderr"))
        return subprocess.CompletedProcess(arguments, status, out, err)

    def status(self, job: dict[str, Any]) -> int:
        """Of a job beside others, which is waited for."""
        self._ask({"wait": job["launcher"]})
        return self.ended()

    def finish(self, command: list[str], keys: Path, **others: Any) -> None:
        status = self.run(command, keys, **others)
        assert status == 0, f"{command}: status {status}\n" + self.log[-6000:]

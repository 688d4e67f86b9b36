"""Jobs on forked ranks; see chaos_host.py."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from processes import kill_group

CHECKOUT = Path(__file__).resolve().parents[2]
# What a job may take on a busy machine: those of these tests take 3 to 20 s on a quiet one.
ANSWER_SECONDS = 300.0


class Host:
    """The process that starts jobs, see chaos_host.py; the jobs run in the present test's `folder`.

    A job that does not end within the limit fails its test with the stacks of all its processes in the log, and no
    test meets the jobs that another one left behind.
    """

    def __init__(self) -> None:
        self.folder = Path()
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
            [sys.executable, str(Path(__file__).with_name("chaos_host.py"))],
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
        job |= {"log": str(self.folder / "log.txt"), "environment": environment or {}, "beside": beside}
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

    def status(self, job: dict[str, Any]) -> int:
        """Of a job beside others, which is waited for."""
        self._ask({"wait": job["launcher"]})
        return self.ended()

    def finish(self, command: list[str], keys: Path, **others: Any) -> None:
        status = self.run(command, keys, **others)
        assert status == 0, f"{command}: status {status}\n" + self.log[-6000:]


@pytest.fixture(scope="session")
def host_process() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def host(host_process: Host, tmp_path: Path) -> Iterator[Host]:
    host_process.folder = tmp_path
    yield host_process
    host_process.clear()


class Place:
    """A folder with a tiny autoencoder "ae" and its images, in which jobs run as a user would start them."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder = host, folder

    def run(self, *command: str, ranks: int = 1) -> None:
        """A job that must end well."""
        self.host.folder = self.folder
        self.host.finish(list(command), self.folder / "keys.jsonl", ranks=ranks)

    @property
    def log(self) -> str:
        self.host.folder = self.folder
        return self.host.log


@pytest.fixture(scope="session")
def small_place(host_process: Host, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One first stage for the tasks of several files."""
    place = Place(host_process, tmp_path_factory.mktemp("tasks"))
    place.run(
        "autoencoder", "experiment=smoke", "run.dir=ae", "train.max_steps=2", "train.rank_micro_batch=8"
    )
    return place

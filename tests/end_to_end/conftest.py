"""Jobs on forked ranks; see chaos_host.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


class Host:
    """The process that starts jobs, see chaos_host.py; the jobs run in the present test's `folder`."""

    def __init__(self) -> None:
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(CHECKOUT),
        }
        self.folder = Path()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("chaos_host.py"))],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def log(self) -> str:
        """What the jobs of this test have said."""
        file = self.folder / "log.txt"
        return file.read_text() if file.exists() else ""

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
        self.ask(job)
        return self.answer()

    def ask(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log[-6000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, command: list[str], keys: Path, **others: Any) -> int:
        """The status of a job that was waited for."""
        self.start(command, keys, **others)
        return int(self.answer()["status"])

    def status(self, job: dict[str, Any]) -> int:
        """Of a job beside others, which is waited for."""
        self.ask({"wait": job["launcher"]})
        return int(self.answer()["status"])

    def finish(self, command: list[str], keys: Path, **others: Any) -> None:
        status = self.run(command, keys, **others)
        assert status == 0, f"{command}: status {status}\n" + self.log[-6000:]


@pytest.fixture(scope="session")
def host_process() -> Iterator[Host]:
    host = Host()
    yield host
    assert host.process.stdin is not None
    host.process.stdin.close()
    host.process.wait(timeout=60)


@pytest.fixture
def host(host_process: Host, tmp_path: Path) -> Host:
    host_process.folder = tmp_path
    return host_process

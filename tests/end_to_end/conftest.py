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
    """The process that starts jobs; see chaos_host.py."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(CHECKOUT),
        }
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("chaos_host.py"))],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, command: list[str], keys: Path, ranks: int = 2) -> dict[str, Any]:
        assert self.process.stdin is not None
        job = {"arguments": command, "ranks": ranks, "folder": str(self.folder), "keys": str(keys)}
        self.process.stdin.write(json.dumps(job | {"log": str(self.folder / "log.txt")}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.folder / "log.txt").read_text()[-6000:]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def finish(self, command: list[str], keys: Path) -> None:
        self.start(command, keys)
        status = self.answer()["status"]
        assert status == 0, f"{command}: status {status}\n" + (self.folder / "log.txt").read_text()[-6000:]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    assert host.process.stdin is not None
    host.process.stdin.close()
    host.process.wait(timeout=60)

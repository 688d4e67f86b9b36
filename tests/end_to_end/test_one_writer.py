"""A run folder has one writer: other starts are refused or wait, and a process that comes back from the dead writes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COMMAND = [
    "diffusion", "experiment=smoke", "data.workers=0", "run.dir=run", "zero=1", "run.lease_seconds=4",
    "preview.every_steps=0", "tracking.wandb=off", "train.garbage_every_steps=0", "safety.dry_run=false",
    "optim.curve=constant", "checkpoint.save_every_steps=1",
]  # fmt: skip


def wait_for(moment: Callable[[], bool], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + 120
    while not moment():
        assert time.monotonic() < deadline, log()[-4000:]
        time.sleep(0.01)


def content(run: Path) -> dict[str, str]:
    """Of everything that counts: metrics, identity, complete checkpoints."""
    files = [
        run / "metrics.jsonl",
        run / "run.json",
        *run.glob("checkpoints/*"),
        *run.glob("checkpoints/*/*"),
    ]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and ".tmp" not in str(path.relative_to(run))
    }


def test_a_held_run_refuses_others_and_a_stopped_process_that_wakes_up_publishes_nothing(
    host: Any, tmp_path: Path
) -> None:
    run, keys = tmp_path / "run", tmp_path / "keys.jsonl"
    metrics = run / "metrics.jsonl"
    first = host.start([*COMMAND, "train.max_steps=100000"], keys, beside=True)
    everyone = [first["launcher"], *first["ranks"]]
    try:
        wait_for(lambda: (run / "checkpoints" / "latest").exists(), lambda: host.log)
        # A second start is refused, and told by whom.
        assert host.run([*COMMAND, "train.max_steps=100000"], keys) == 2
        told = re.search(
            r"in use by process (\d+) on (\S+), since \S+ \S+, last sign of life (\d+) s ago", host.log
        )
        assert told is not None and "run.wait=true" in host.log, host.log[-3000:]
        assert int(told[1]) == first["ranks"][0] and told[2] == socket.gethostname() and int(told[3]) < 60
        # The holder goes on undisturbed, until it is stopped in the middle of a save.
        size = metrics.stat().st_size
        wait_for(lambda: metrics.stat().st_size > size, lambda: host.log)
        second = host.start([*COMMAND, "train.max_steps=100000", "run.wait=true"], keys, beside=True)
        wait_for(lambda: bool(list(run.glob("checkpoints/step_*.tmp"))), lambda: host.log)
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        attempt = json.loads((run / "run.json").read_text())["attempts"]
        at = done(metrics)
        wait_for(lambda: json.loads((run / "run.json").read_text())["attempts"] > attempt, lambda: host.log)
        assert time.monotonic() - stopped > 2.0  # not before the holder had shown no life for a while
        assert "taken over" in host.log
        wait_for(lambda: done(metrics) > at + 1, lambda: host.log)
        os.kill(second["ranks"][1], signal.SIGTERM)
        assert host.status(second) == 75, host.log[-4000:]
        before, until = content(run), done(metrics)
        # Back from the dead.
        for pid in everyone:
            os.kill(pid, signal.SIGCONT)
        assert host.status(first) not in (0, 2, 75)
        assert content(run) == before
        # A rank that was stopped just behind its look at the lease makes its folder when it wakes: nobody reads that, and the
        # next save removes it.
        left = [path.name for path in run.glob("checkpoints/*.tmp")]
        assert all(name.endswith(f".{attempt:05d}.tmp") for name in left), left
    finally:
        for pid in everyone:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, until + 1))
    host.finish([*COMMAND, f"train.max_steps={until + 1}"], keys)
    assert not list(run.glob("checkpoints/*.tmp"))


def done(metrics: Path) -> int:
    """The last step in metrics.jsonl."""
    with suppress(OSError, IndexError, ValueError):
        return int(json.loads(metrics.read_text().splitlines()[-1])["step"])
    return 0

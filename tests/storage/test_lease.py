"""A folder is held by one process, given up at its death, and a holder that comes back from the dead is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from processes import line_of, running

from ldmscale.storage.lease import LeaseHeldError, LeaseLostError, newest_holder, take

# argv: folder, timeout. Takes the lease, says its number, and every 0.1 s whether it still holds it.
HOLDER = """
import sys, time
from pathlib import Path
from ldmscale.storage.lease import LeaseHeldError, take
try:
    lease = take(Path(sys.argv[1]), timeout_seconds=float(sys.argv[2]), on_lost=lambda: print("lost", flush=True))
except LeaseHeldError:
    sys.exit("held")
print(lease.number, flush=True)
while True:
    time.sleep(0.1)
"""


def holder(folder: Path, timeout: float) -> AbstractContextManager[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder), str(timeout)]
    return running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def elsewhere(folder: Path) -> None:
    """Make the newest holder one of another host."""
    path = max(folder.glob("lease_*.json"))
    beat = path.stat().st_mtime
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "node7", "processes": "another boot"}))
    os.utime(path, (beat, beat))


def test_of_many_that_come_at_once_one_gets_it(tmp_path: Path) -> None:
    with ExitStack() as stack:
        processes = [stack.enter_context(holder(tmp_path, 60.0)) for _ in range(5)]
        deadline = time.monotonic() + 60
        while sum(process.poll() is not None for process in processes) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        alive = [process for process in processes if process.poll() is None]
        assert len(alive) == 1
        told = [process.communicate(timeout=60)[1] for process in processes if process not in alive]
        assert [each.strip() for each in told] == ["held"] * 4
        found = newest_holder(tmp_path)
        assert found is not None and found.pid == alive[0].pid and found.number == 1
    lease = take(tmp_path, timeout_seconds=3600.0)  # a dead process of this host is followed at once
    assert lease.number == 2
    lease.release()


def test_one_that_comes_back_from_the_dead_is_told_and_writes_no_more(tmp_path: Path) -> None:
    lost = threading.Event()
    stale = take(tmp_path, timeout_seconds=1.0, on_lost=lost.set)
    stale.check()
    with holder(tmp_path, 0.5) as other:
        assert other.wait(timeout=60) == 1  # alive: refused
    # As a node that hangs: the heartbeat stops (its thread waits for the disk), the file grows old.
    path = tmp_path / "lease_00000001.json"
    stale._timeout = 3600.0
    time.sleep(0.4)
    os.utime(path, (1.0, 1.0))
    with holder(tmp_path, 1.0) as other:
        assert line_of(other) == "2\n"
        assert not stale.held()
        with pytest.raises(LeaseLostError, match=f"taken over by process {other.pid} on"):
            stale.check()
    stale.release()  # takes nothing away from the one who holds it now
    found = newest_holder(tmp_path)
    assert found is not None and found.number == 2 and not found.released


def test_the_stale_holder_hears_of_it_by_itself(tmp_path: Path) -> None:
    with holder(tmp_path, 1.0) as stale:
        assert line_of(stale) == "1\n"
        stale.send_signal(signal.SIGSTOP)
        lease = take(tmp_path, timeout_seconds=1.0, wait_seconds=30.0)
        assert lease.number == 2
        stale.send_signal(signal.SIGCONT)
        assert line_of(stale) == "lost\n"
    lease.check()
    lease.release()


def test_one_on_another_host_is_watched_until_it_shows_life_or_its_time_is_over(tmp_path: Path) -> None:
    first = take(tmp_path, timeout_seconds=60.0)
    first._ended.set()  # no heartbeat any more
    elsewhere(tmp_path)
    beat = threading.Timer(0.8, lambda: os.utime(tmp_path / "lease_00000001.json"))
    beat.start()
    began = time.monotonic()
    with pytest.raises(LeaseHeldError, match="on node7"):
        take(tmp_path, timeout_seconds=60.0)
    assert time.monotonic() - began < 50  # not for its whole time
    beat.join(60)
    second = take(tmp_path, timeout_seconds=1.5)  # shows no life any more
    assert second.number == 2
    second.release()


def test_a_released_folder_is_taken_at_once_and_numbers_grow(tmp_path: Path) -> None:
    for number in range(1, 6):
        lease = take(tmp_path)
        assert lease.number == number
        lease.release()
    assert len(list(tmp_path.iterdir())) == 2  # the last one, and the one before


def test_waiting_ends_when_the_holder_gives_it_free(tmp_path: Path) -> None:
    lease = take(tmp_path)
    threading.Timer(0.7, lease.release).start()
    after = take(tmp_path, wait_seconds=300.0)
    assert after.number == 2
    after.release()

"""Loading processes that hang, die or cannot hand over, and nodes that lack what they need: real processes and limits."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from processes import line_of, running

from ldmscale import waiting
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.node_limits import descriptor_faults, shared_memory_faults, socket_faults
from ldmscale.data.loading.training_data import next_for_all
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import Sample
from ldmscale.distributed.preemption import StopFlag
from ldmscale.errors import LdmscaleError, StoppedEarlyError
from ldmscale.launcher import free_port

Item = Callable[[Sample, int], Mapping[str, Any]]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, write_shards: Callable[..., list[str]]) -> ShardIndex:
    return ShardIndex.build(write_shards(tmp_path_factory.mktemp("set"), [8]))


class Hangs:
    """A read that never ends, as of a file server that went away, from the third sample on (pytorch#1355: of one image)."""

    def __call__(self, sample: Sample, position: int) -> dict[str, Any]:
        while position >= 2:
            time.sleep(600)
        return {"number": position}


def loader_of(index: ShardIndex, item: Item, workers: int = 1) -> Loader:
    return Loader(index, item, seed=0, rank=0, world=1, global_batch=1, rank_micro_batch=1, workers=workers)


def pids(loader: Loader) -> list[int]:
    return [worker.pid for worker in loader._iterator._workers]  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_loading_process_that_hangs_is_named_and_a_stop_signal_is_obeyed(
    index, workers, monkeypatch, caplog
):
    """pytorch#5040, riga/law#184: TERM was ignored for ever."""
    monkeypatch.setattr(waiting, "SAY_AFTER_SECONDS", 0.5)
    loader = loader_of(index, Hangs(), workers)
    with StopFlag().install([signal.SIGTERM]), caplog.at_level(logging.WARNING):
        assert [int(next_for_all(loader)["position"]) for _ in range(2)] == [0, 1]
        processes = pids(loader)
        os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(StoppedEarlyError, match="SIGTERM while waiting: the next batch"):
            next_for_all(loader)
        assert time.monotonic() - began < 5
    assert any(str(processes[0]) in line and "waiting for" in line for line in caplog.messages)
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_a_batch_that_comes_soon_after_a_stop_is_still_taken(index):
    class Slow:
        def __call__(self, sample: Sample, position: int) -> dict[str, Any]:
            time.sleep(1.2 if position else 0.0)
            return {"number": position}

    loader = loader_of(index, Slow())
    with StopFlag() as stop:
        waiting.obey(lambda: stop.reason)
        next_for_all(loader)
        stop.request("test")
        assert int(next_for_all(loader)["position"]) == 1
    loader.close()


@pytest.mark.parametrize(
    ("number", "hint"), [(signal.SIGKILL, "memory is short"), (signal.SIGBUS, "/dev/shm is full")]
)
def test_a_loading_process_that_is_killed_is_an_error_at_once(index, number, hint):
    loader = loader_of(index, Hangs())
    next_for_all(loader), next_for_all(loader)
    (pid,) = pids(loader)
    os.kill(pid, number)
    began = time.monotonic()
    with pytest.raises(LdmscaleError, match=rf"pid {pid}\) was killed by {number.name}: .*{hint}"):
        next_for_all(loader)
    assert time.monotonic() - began < 4


class WithoutDescriptors:
    """A loading process that may open no more files, from its second sample on."""

    def __call__(self, sample: Sample, position: int) -> dict[str, Any]:
        if position:
            now = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (now - 1, now - 1))
        return {"image": np.zeros(4, np.uint8)}


def test_a_loading_process_that_runs_out_of_descriptors_is_an_error_and_no_endless_wait(index, caplog):
    """pytorch#2474: "Too many open files" in the thread of the queue, and the training waited for ever."""
    loader = loader_of(index, WithoutDescriptors())
    began = time.monotonic()
    with pytest.raises(LdmscaleError, match=r"could not hand over its batch|ended with status"):
        for _ in range(8):
            next_for_all(loader)
    assert time.monotonic() - began < 10


_TWO_RANKS = """
import sys, time
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.training_data import next_for_all
from ldmscale.data.shards.index import ShardIndex
from ldmscale.distributed.preemption import StopFlag
from ldmscale.distributed.process_group import close_world, open_world
from ldmscale.errors import StoppedEarlyError

class HangsOnRank1:
    def __call__(self, sample, position):
        while position == 3:  # the second of rank 1
            time.sleep(600)
        return {"number": position}

with StopFlag().install():
    world = open_world()
    loader = Loader(
        ShardIndex.build([sys.argv[1]]), HangsOnRank1(), seed=0, rank=world.rank, world=2, global_batch=2, rank_micro_batch=1,
        workers=1,
    )
    next_for_all(loader)
    print("one step", flush=True)
    try:
        next_for_all(loader)
    except StoppedEarlyError as error:
        print(error, error.shared, flush=True)  # rank 0 leaves its loader open: Python must end all the same
        close_world()
        sys.exit(75)
"""


@pytest.mark.distributed
def test_all_ranks_stop_together_where_the_loading_process_of_one_hangs(index):
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    shared |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", _TWO_RANKS, index.shards[0]]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                running(
                    command,
                    env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in ("0", "1")
        ]
        assert [line_of(process) for process in ranks] == ["one step\n"] * 2
        time.sleep(1.0)
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        for process in ranks:
            out = process.communicate(timeout=60)[0]
            assert process.returncode == 75
            assert out.startswith(
                "rank 1: stopped by signal SIGTERM while waiting: the next batch"
            ) and out.endswith("True\n")
        assert time.monotonic() - began < 8  # the stop, and the end of Python with torch


_HAND_OVER = """
import sys
import numpy as np
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.training_data import next_for_all
from ldmscale.data.shards.index import ShardIndex
from ldmscale.errors import LdmscaleError

class Large:
    def __call__(self, sample, position):
        return {"image": np.zeros(600_000, np.uint8)}

loader = Loader(ShardIndex.build([sys.argv[1]]), Large(), seed=0, rank=0, world=1, global_batch=1, rank_micro_batch=1, workers=1)
kept = []
try:
    for _ in range(8):
        kept.append(next_for_all(loader))
except LdmscaleError as error:
    print(f"{len(kept)} batches, then: {error}")
"""

_SMALL = 'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'


def in_small_shared_memory(size: str, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `command` where /dev/shm is a file system of that size, as in a container of docker (64 MB there)."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs unshare, and the right to mount")
    words = ["unshare", "-rm", "sh", "-c", _SMALL.format(size=size), "sh", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **options)


def test_a_batch_that_does_not_fit_into_shared_memory_is_an_error_and_no_endless_wait(index):
    done = in_small_shared_memory("1m", [sys.executable, "-c", _HAND_OVER, index.shards[0]])
    # The second batch finds no room, perhaps while the first is handed over.
    assert re.match(r"[01] batches, then: rank 0: LdmscaleError: loading process 0", done.stdout), done.stderr
    assert "could not hand over its batch" in done.stdout and "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_job_whose_batches_do_not_fit_into_shared_memory_ends_before_its_workers_start(tmp_path):
    command = [sys.executable, "-m", "ldmscale", "autoencoder", "experiment=smoke", f"run.dir={tmp_path}/run"]
    # 2 processes, 4 batches ahead, one in the making, one in use; 4 images of 3 x 32 x 32 bytes each: 144 KiB for images alone.
    command += ["data.workers=2", "train.rank_micro_batch=4", "train.global_batch=4", "data.image_size=32"]
    done = in_small_shared_memory("100k", command, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 2, done.stderr
    assert "/dev/shm has 0.1 MiB free, but data.workers=2 on 1 rank(s)" in done.stderr
    # The noise that the loading processes draw comes to it.
    assert re.search(r"need 0\.[1-9] MiB.*--shm-size=1g.*or data\.workers=[01]$", done.stderr, re.M)


def test_shared_memory_is_compared_with_all_batches_in_flight(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    given = {"workers": 3, "prefetch": 4, "local_ranks": 2, "folder": tmp_path}
    fits = free // (3 * 6 * 2) - 2**16
    assert shared_memory_faults(fits, **given) == []
    (fault,) = shared_memory_faults(2 * fits, **given)
    assert "data.workers=1" in fault.split(", or ")[-1]
    assert shared_memory_faults(2 * fits, **(given | {"workers": 0})) == []


_CHECK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from ldmscale.distributed.environment import Ranks
from ldmscale.errors import ConfigError
from ldmscale.setup.node_checks import check_processes
try:
    check_processes(Ranks(0, int(sys.argv[4])), int(sys.argv[3]))
except ConfigError as error:
    print(*error.faults, sep="\\n")
print("limit", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def checked(*numbers: int, **env: str) -> list[str]:
    command = [sys.executable, "-c", _CHECK, *map(str, numbers)]
    done = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.splitlines()


def test_the_limit_on_open_files_is_raised_as_far_as_it_goes_and_a_long_temporary_folder_refused(tmp_path):
    short = tmp_path / "t"
    long = short / ("x" * (80 - len(str(short)) - 1)) if len(str(short)) < 79 else short
    long.mkdir(parents=True)
    size = len(str(long)) + 32  # "/pymp-" and "/listener-", with eight characters for each (tempfile)
    fault, limit = checked(300, 4096, 4, 8, TMPDIR=str(long))
    assert limit == "limit 4096"
    # sun_path holds 108 with the zero at its end: unix(7)
    assert (
        str(long) in fault
        and f"{size} bytes" in fault
        and "takes 107" in fault
        and "at most 75 bytes" in fault
    )


def test_too_few_open_files_are_named_with_what_is_needed():
    fault, limit = checked(300, 300, 16, 8)
    assert limit == "limit 300"
    assert "may open 300 files" in fault and "data.workers=16 and 8 rank(s) need 1168" in fault


def test_what_this_machine_offers_is_enough():
    assert not descriptor_faults(workers=2, prefetch=4, ranks=2) + socket_faults(workers=0)

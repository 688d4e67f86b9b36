"""Ranks that come late, never, or find the port taken: real processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import running

from ldmscale import waiting
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.muster import gather_at_store
from ldmscale.errors import ConfigError
from ldmscale.launcher import free_port

_RANK = """
import sys, time
from ldmscale import waiting
waiting.SAY_AFTER_SECONDS = 0.5
from ldmscale.distributed.preemption import StopFlag
from ldmscale.distributed.process_group import open_world, close_world
from ldmscale.distributed.collectives import sum_over_ranks
from ldmscale.errors import StoppedEarlyError
with StopFlag().install():
    print("installed", flush=True)
    try:
        world = open_world()
    except StoppedEarlyError as error:
        sys.exit(75)
    print(sum_over_ranks(world.rank + 1), flush=True)
    close_world()
"""


def rank(number: int, size: int, port: int, **more: str) -> dict[str, object]:
    env = {
        "RANK": str(number),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": str(size),
    }
    env |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {"env": os.environ | env | more, **pipes}


@pytest.mark.distributed
def test_ranks_that_come_one_after_another_find_each_other_and_the_first_names_the_missing():
    port = free_port()
    command = [sys.executable, "-c", _RANK]
    # The server of rank 0 comes last: until then its port refuses.
    with running(command, **rank(2, 3, port)) as third, running(command, **rank(1, 3, port)) as second:
        assert second.stdout.readline() == third.stdout.readline() == "installed\n"
        time.sleep(1.0)
        with running(command, **rank(0, 3, port)) as first:
            for process in (first, second, third):
                out, err = process.communicate(timeout=60)
                assert process.returncode == 0, err
                assert out.split()[-1] == "6.0"
    assert f"cannot reach rank 0 at 127.0.0.1:{port}" in err


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "cause"), [(0, "not there: rank 1, 2"), (1, "cannot reach rank 0 at 127.0.0.1:{port}")]
)
def test_a_rank_whose_others_never_come_says_so_and_obeys_a_stop_within_seconds(number, cause):
    port = free_port()
    with running([sys.executable, "-c", _RANK], **rank(number, 3, port)) as process:
        line = process.stderr.readline()
        assert "waiting for" in line and cause.format(port=port) in line
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
        assert time.monotonic() - began < 5


def test_missing_ranks_are_an_error_at_the_time_limit_that_names_them_and_slurms_step():
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "SLURM_JOB_ID": "42",
        "SLURM_STEP_ID": "3",
    }
    env |= {"SLURM_PROCID": "0"}
    with pytest.raises(waiting.WaitTimeoutError) as caught:
        gather_at_store(Ranks(0, 20), env, timeout=timedelta(seconds=9), limit_seconds=0.3)
    text = str(caught.value)
    assert "not there: rank 1, 2, 3, 4, 5, 6, 7, 8 and 11 more" in text
    assert "Slurm step 42.3" in text and "env -u SLURM_PROCID" in text


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("second", "size", "message"),
    [
        (1, 3, "two processes are rank 1 of 3"),
        (2, 4, "was started as one of 4 ranks, and another one as one of 3"),
    ],
)
def test_ranks_that_are_numbered_twice_or_counted_otherwise_are_refused_at_once(second, size, message):
    """Lightning-AI/pytorch-lightning#4389 and #10098: several processes of one global rank, which waited for ever."""
    port = free_port()
    command = [sys.executable, "-c", _RANK]
    with running(command, **rank(0, 3, port)) as first, running(command, **rank(1, 3, port)):
        while "not there: rank 2;" not in (line := first.stderr.readline()).replace(".", ";"):
            assert line
            time.sleep(0.1)
        with running(command, **rank(second, size, port)) as other:
            assert message in other.communicate(timeout=60)[1]
            assert other.returncode == 1


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} is in use"):
            gather_at_store(Ranks(0, 2), env, timeout=timedelta(seconds=9), limit_seconds=5)

"""Starting several ranks of one node: statuses, signals, and what ranks find in their environment."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from processes import running

from ldmscale.distributed.preemption import Interruptible, StopSignal
from ldmscale.errors import ConfigError
from ldmscale.launcher import count_gpus, free_port, launch, run_ranks, shared_environment, visible_gpus

CHECKOUT = Path(__file__).parents[2]
# argv: number of ranks, then the program of a rank
STARTER = """
import logging, os, sys
from ldmscale.launcher import run_ranks, shared_environment
logging.basicConfig(format="%(message)s")
count = int(sys.argv[1])
command, alone = [sys.executable, "-c", sys.argv[2]], "ALONE" in os.environ
sys.exit(run_ranks(command, shared_environment(os.environ, count, 0), count, independent=alone))
"""
RANK = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"


def start(count: int, program: str, **options) -> AbstractContextManager[subprocess.Popen]:
    command = [sys.executable, "-c", STARTER, str(count), RANK + program]
    return running(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def status(count: int, program: str) -> int:
    with start(count, program) as process:
        return process.wait(timeout=60)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("", 0),
        ("sys.exit(2)", 2),
        ("sys.exit(75)", 75),
        ("sys.exit(3 if rank else 0)", 3),
        ("sys.exit(75 if rank else 1)", 1),  # one rank failed: the save is not complete
        ("sys.exit(75 if rank else 2)", 2),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_the_status_of_the_ranks_is_the_status_of_the_job(program, expected):
    assert status(2, program) == expected


@pytest.mark.distributed
def test_a_dying_rank_ends_the_others_and_its_status_is_kept():
    begun = time.monotonic()
    # rank 0 would wait for rank 1 for ever, and says when it was asked to end
    program = "sys.exit(7) if rank else None\n" + (
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked to end', flush=True), sys.exit(75)))\n"
        "time.sleep(300)"
    )
    with start(2, program) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "asked to end" in out and "rank 1 ended with status 7" in err
    assert time.monotonic() - begun < 200


PARTING = """
from pathlib import Path
from ldmscale.distributed.environment import PARTED, have_parted, part
def all_have_parted():
    return have_parted(Path(os.environ[PARTED]), [0, 1])
"""


@pytest.mark.distributed
def test_independent_ranks_go_on_without_a_dead_one_and_finish_its_work():
    environment = os.environ | {"ALONE": "1"}
    dies = "part(rank)\nwhile not all_have_parted(): time.sleep(0.01)\nif rank: os.kill(os.getpid(), signal.SIGKILL)\n"
    with start(2, PARTING + dies + "time.sleep(3)\nprint('finished')", env=environment) as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and out == "finished\n"
    assert "rank 1 ended with status 137; the others go on" in err
    with start(2, "sys.exit(75 if rank else 3)", env=environment) as process:
        assert process.wait(timeout=60) == 3  # nobody finished it


@pytest.mark.distributed
def test_a_rank_that_parts_after_another_one_died_goes_on_longer_than_one_that_waits_may():
    # By then the launcher has seen the death, and would end it 15 s later.
    program = "part(rank)\nif rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(18)\nprint('finished')"
    late = "if rank == 0: time.sleep(4)\n"
    with start(2, PARTING + late + program, env=os.environ | {"ALONE": "1"}) as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and out == "finished\n", err
    assert "those that wait for it are ended too" in err and "the others go on" in err


@pytest.mark.distributed
def test_independent_ranks_that_still_wait_for_a_dead_one_are_ended():
    # At the rendezvous, where rank 0 would have been.
    with start(
        2, "sys.exit(7) if rank == 0 else time.sleep(300)", env=os.environ | {"ALONE": "1"}
    ) as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode == 7
    assert "rank 0 ended with status 7; those that wait for it are ended too" in err


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_every_rank(number, tmp_path):
    program = f"""
signal.signal({number.value}, lambda *_: (open(r'{tmp_path}/stopped' + str(rank), 'w').close(), sys.exit(75)))
open(r'{tmp_path}/ready' + str(rank), 'w').close()
time.sleep(300)
"""
    with start(3, program) as process:
        wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 3)
        process.send_signal(number)
        assert process.wait(timeout=60) == 75
    assert len(list(tmp_path.glob("stopped*"))) == 3


@pytest.mark.distributed
@pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel tells ranks of the launcher's death on Linux only"
)
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    program = f"open(r'{tmp_path}/' + str(os.getpid()), 'w').close(); time.sleep(300)"
    with start(2, program) as process:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        pids = [int(path.name) for path in tmp_path.iterdir()]
        process.kill()
        wait_for(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.distributed
def test_rank_0_alone_reads_standard_input():
    with start(
        2, "sys.stdout.write(f'{rank} {sys.stdin.read()!r}' + chr(10))", stdin=subprocess.PIPE
    ) as process:
        out, _ = process.communicate("a prompt", timeout=60)
    assert sorted(out.splitlines()) == ["0 'a prompt'", "1 ''"]


@pytest.mark.distributed
def test_ranks_know_each_other():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with start(2, f"sys.stdout.write(' '.join(os.environ[name] for name in {names}) + chr(10))") as process:
        out, _ = process.communicate(timeout=60)
    first, second = sorted(line.split() for line in out.splitlines())
    assert first[:5] == ["0", "0", "2", "2", "127.0.0.1"] and second[:5] == ["1", "1", "2", "2", "127.0.0.1"]
    assert first[5] == second[5]


@pytest.mark.distributed
def test_a_signal_that_ranks_finish_in_spite_of_reaches_the_caller_who_asks_for_it():
    """The stage of a quickstart that ends well after Ctrl-C is followed by no other."""
    program = "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGTERM)"
    command = [sys.executable, "-c", program]
    with Interruptible() as signals:
        assert run_ranks(command, {**os.environ}, 1) == 0 and signals.reason is None
        with pytest.raises(StopSignal):
            run_ranks(command, {**os.environ}, 1, deliver=True)


def test_cores_are_shared_among_ranks_unless_the_user_says_otherwise():
    cores = len(os.sched_getaffinity(0))
    assert shared_environment({}, 1, 0)["OMP_NUM_THREADS"] == str(cores)
    assert shared_environment({}, 1000, 0)["OMP_NUM_THREADS"] == "1"
    assert shared_environment({"OMP_NUM_THREADS": "5"}, 2, 0)["OMP_NUM_THREADS"] == "5"


def test_without_gpus_ranks_are_told_to_use_the_cpu():
    assert shared_environment({}, 2, 0)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in shared_environment({}, 2, 2)


def test_an_outer_torchrun_is_not_asked_by_the_ranks():
    assert "TORCHELASTIC_USE_AGENT_STORE" not in shared_environment(
        {"TORCHELASTIC_USE_AGENT_STORE": "True"}, 1, 0
    )


def test_a_free_port_can_be_bound():
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_gpus_are_not_counted_where_they_are_not_to_be_used():
    assert count_gpus({**os.environ, "DS_ACCELERATOR": "cpu"}) == 0


TWO = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c8e7a10-1111-2222-3333-444455556666)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5d000000-1111-2222-3333-444455556666)
"""
SPLIT = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c8e7a10-1111-2222-3333-444455556666)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.20gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
"""


@pytest.mark.parametrize(
    ("listing", "visible", "count"),
    [  # CUDA C++ Programming Guide, "CUDA Environment Variables"; MIG user guide, "CUDA Visible Devices"
        (TWO, None, 2),
        (TWO, "0,1", 2),
        (TWO, "1, 0", 2),
        (TWO, "1", 1),
        (TWO, "", 0),
        (TWO, "-1", 0),
        (TWO, "0,-1,1", 1),  # devices before the first entry that names none
        (TWO, "-1,0", 0),
        (TWO, "0,9,1", 1),
        (TWO, "9,0", 0),
        (TWO, "0,,1", 1),
        (TWO, "0,0", 0),  # twice the same: none
        (TWO, "0,1,0", 0),
        (TWO, "NoDevFiles", 0),  # what Slurm and Grid Engine set where no device was granted
        (TWO, "GPU-5c8e7a10-1111-2222-3333-444455556666", 1),
        (TWO, "GPU-5c,GPU-5d", 2),  # the beginning of a UUID
        (TWO, "GPU-5", 0),  # which is not one device
        (TWO, "GPU-ffff,0", 0),
        (TWO, "0,GPU-5c8e7a10", 0),
        (SPLIT, None, 1),  # a process sees one instance
        (SPLIT, "0", 1),
        (SPLIT, "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", 1),
        (SPLIT, "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f,MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb", 1),
        (SPLIT, "MIG-GPU-5c8e7a10-1111-2222-3333-444455556666/1/0", 1),
        (SPLIT, "MIG-ffff", 0),
        (TWO, "MIG-c6d4f1ef", 0),
        ("GPU 0: Tesla\n", None, 1),
        ("No devices found.\n", "0", 0),
    ],
)
def test_gpus_are_counted_as_cuda_shows_them(listing, visible, count):
    assert visible_gpus(listing, visible) == count


def test_no_ranks_cannot_be_started():
    with pytest.raises(ConfigError, match="at least 1"):
        launch(["index"], ranks=0)


def wait_for(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """False for a process that is gone, and for a dead one whom nobody has waited for yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")

"""Every wait of the package: what may last longer than 10 s logs its cause, stops within 5 s of a signal, and has a limit.

`CALLS` is the list of all calls that can block, each with its class; a new one fails here until it is entered.
"""

from __future__ import annotations

import ast
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from processes import line_of, running

from ldmscale import waiting
from ldmscale.checkpoint.two_phase import Background
from ldmscale.cluster import slurm
from ldmscale.data.latents.work_queue import Claims
from ldmscale.data.shards.urls import run_pipes
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.muster import gather_at_store
from ldmscale.distributed.preemption import StopFlag
from ldmscale.errors import StoppedEarlyError
from ldmscale.launcher import free_port
from ldmscale.storage.atomic import locked
from ldmscale.storage.lease import take
from ldmscale.storage.object_store import Storage

CHECKOUT = Path(__file__).resolve().parents[1]

SHORT = "less than 10 s"
WAIT = "a loop of `waiting.Wait` or `waiting.finished`"
ANNOUNCED = "`waiting.announced` around it, and a limit of its own"
BACKGROUND = "a thread that the process does not wait for at its end, or not for long"
INNER = "a thread or process that has a wait of its own, and ends by it"
AGREED = "ranks that wait for each other: the group's timeout is the limit, each of them obeys a stop, the watchdog reports"
CALLS = {
    ("checkpoint/manager.py", "self._saving.work.wait"): WAIT,
    ("checkpoint/manager.py", "self._upload[1].wait"): WAIT,
    ("checkpoint/two_phase.py", "self._thread.join"): WAIT,
    ("checkpoint/two_phase.py", "self._work.wait"): WAIT,
    ("cluster/doctor_machine.py", "barrier"): ANNOUNCED,
    ("cluster/doctor_machine.py", "dist.all_reduce"): AGREED,
    ("data/latents/writer.py", "readers.map"): INNER,
    ("data/loading/fetch.py", "each.result"): INNER,
    ("data/loading/loader.py", "DataLoader"): WAIT,
    ("data/loading/workers.py", "time.sleep"): SHORT,
    ("distributed/collectives.py", "dist.all_gather_object"): ANNOUNCED,
    ("distributed/collectives.py", "dist.all_reduce"): ANNOUNCED,
    ("distributed/collectives.py", "dist.barrier"): ANNOUNCED,
    ("distributed/collectives.py", "dist.broadcast_object_list"): ANNOUNCED,
    ("distributed/environment.py", "time.sleep"): BACKGROUND,
    ("distributed/muster.py", "TCPStore"): SHORT,  # its server answers already
    ("distributed/muster.py", "socket.create_connection"): WAIT,
    ("distributed/preemption.py", "time.sleep"): BACKGROUND,
    ("distributed/process_group.py", "dist.init_process_group"): SHORT,  # all ranks are there
    ("distributed/watchdog.py", "self._ended.wait"): BACKGROUND,
    ("distributed/watchdog.py", "self._thread.join"): ANNOUNCED,
    ("distributed/watchdog.py", "thread.join"): BACKGROUND,  # in the watchdog, with a limit
    ("distributed/watchdog.py", "time.sleep"): BACKGROUND,
    ("launcher.py", "process.wait"): SHORT,  # after SIGKILL
    ("launcher.py", "subprocess.Popen"): SHORT,
    ("launcher.py", "time.sleep"): WAIT,
    ("setup/index.py", "barrier"): ANNOUNCED,
    ("setup/trainer.py", "barrier"): ANNOUNCED,
    ("stages/latents.py", "DataLoader"): WAIT,
    ("stages/latents.py", "ahead.result"): INNER,
    ("stages/latents.py", "pending[0].result"): WAIT,
    ("stages/latents.py", "self._ahead.shutdown"): INNER,
    ("stages/latents.py", "self._behind.shutdown"): INNER,
    ("stages/latents.py", "self._threads.shutdown"): INNER,
    ("stages/latents.py", "self._uploads.shutdown"): INNER,
    ("storage/atomic.py", "fcntl.flock"): WAIT,
    ("storage/lease.py", "self._ended.wait"): BACKGROUND,
    ("storage/object_store.py", "answer.result"): WAIT,
    ("storage/store_lease.py", "self._ended.wait"): BACKGROUND,
    ("storage/upload_claim.py", "time.sleep"): SHORT,
    ("tracking/wandb_environment.py", "socket.create_connection"): SHORT,
    ("tracking/wandb_run.py", "wandb.init"): ANNOUNCED,
    ("tracking/wandb_run.py", "self._run.finish"): ANNOUNCED,
    ("train/engine/engine.py", "dist.broadcast"): AGREED,
    ("train/engine/process.py", "dist.init_process_group"): SHORT,  # all ranks are there
    ("train/engine/process.py", "time.sleep"): SHORT,
    ("train/engine/replicated.py", "dist.all_reduce"): AGREED,
    ("train/engine/replicated.py", "dist.broadcast"): AGREED,
    ("train/snapshot.py", "copies.wait"): SHORT,  # for the device
    ("train/trainer.py", "self.checkpoints.wait"): WAIT,
    ("waiting.py", "process.communicate"): WAIT,
    ("waiting.py", "subprocess.Popen"): SHORT,
    ("waiting.py", "time.sleep"): WAIT,
}
_NAMES = {
    "sleep",
    "wait",
    "flock",
    "communicate",
    "create_connection",
    "urlopen",
    "result",
    "select",
    "barrier",
    "all_reduce",
}
_NAMES |= {
    "all_gather_object",
    "broadcast_object_list",
    "broadcast",
    "init_process_group",
    "DataLoader",
    "TCPStore",
    "waitpid",
}
_WHOLE = {
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.check_output",
    "subprocess.check_call",
    "wandb.init",
    "self._run.finish",
}
_OWN = {"self.select"}  # a method of ours of such a name


def _blocks(call: str) -> bool:
    last = call.rpartition(".")[2]
    of_thread = last == "join" and ("thread" in call or "process" in call)
    of_pool = (last == "shutdown" and call.startswith("self._")) or call in ("pool.map", "readers.map")
    return (last in _NAMES or call in _WHOLE or of_thread or of_pool) and call not in _OWN


def test_every_call_that_can_block_is_in_the_table():
    found = set()
    for file in sorted((CHECKOUT / "ldmscale").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and _blocks(call := ast.unparse(node.func)):
                found.add((str(file.relative_to(CHECKOUT / "ldmscale")), call))
    assert found - CALLS.keys() == set(), (
        "give it a cause, a limit and an ear for stop signals (ldmscale/waiting.py), and enter it"
    )
    assert CALLS.keys() - found == set(), "no such call any more"


# ---- Waits that a signal ends. Each row begins one for which nothing ever comes.


def missing_ranks(folder: Path) -> None:
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    gather_at_store(Ranks(0, 3), env, timeout=timedelta(seconds=60))


def missing_rank_0(folder: Path) -> None:
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    gather_at_store(Ranks(2, 3), env, timeout=timedelta(seconds=60))


def silent_store(folder: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # the kernel accepts, and nothing answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/00000.tar"
        with waiting.stoppable():
            Storage(request_seconds=600).read(url, 0, 10)


def refusing_store(folder: Path) -> None:
    with waiting.stoppable():
        Storage(patience_seconds=600).read(f"http://127.0.0.1:{free_port()}/00000.tar", 0, 10)


@contextmanager
def beside(code: str, *arguments: object) -> Iterator[None]:
    """A process that has done `code`, and lives on."""
    program = f"import sys, time\n{code}\nprint('there', flush=True)\ntime.sleep(600)"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    with running(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert line_of(process) == "there\n"
        yield


def held_lock(folder: Path) -> None:
    lock = folder / "x.lock"
    with (
        beside("import fcntl; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)", lock),
        locked(lock),
    ):
        pass


def held_folder(folder: Path) -> None:
    with beside(
        "from pathlib import Path; from ldmscale.storage.lease import take; held = take(Path(sys.argv[1]))",
        folder,
    ):
        take(folder, wait_seconds=600)


def unfinished_set(folder: Path) -> None:
    claims = Claims(folder, ["00000.tar"], lambda number: False)
    lease = claims.place.claim("set", 120.0, lambda: None)
    assert lease is not None
    try:
        claims.once(lambda: False, lambda: None)
    finally:
        lease.release()


def endless_pipe(folder: Path) -> None:
    os.environ["LDMSCALE_CACHE"] = str(folder)
    run_pipes(["pipe:sleep 600 | cat"])


def silent_controller(folder: Path) -> None:
    (folder / "sbatch").write_text("#!/bin/sh\nsleep 600\n")
    (folder / "sbatch").chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    slurm.sbatch(folder / "job.sbatch")


WAITS: dict[Callable[[Path], None], str] = {
    missing_ranks: "not there: rank 1, 2",
    missing_rank_0: "rank 2 of 3 cannot reach rank 0",
    silent_store: "the store's answer about http://127.0.0.1",
    refusing_store: "/00000.tar at byte 0 (ClientConnectorError",
    held_lock: "another process of this node, which holds",
    held_folder: "held by",
    unfinished_set: "another process, which completes the manifest",
    endless_pipe: "the command of pipe:sleep 600 | cat",
    silent_controller: "sbatch, which asks the controller of Slurm",
}


@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: wait.__name__)
def test_a_wait_logs_its_cause_and_stops_within_seconds_of_a_signal(
    wait: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(waiting, "SAY_AFTER_SECONDS", 0.3)
    for name in ("LDMSCALE_CACHE", "PATH"):  # which a row may set
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    signalled: list[float] = []

    def signal_once_it_is_logged() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not any(
            "waiting for" in line and WAITS[wait] in line for line in caplog.messages
        ):
            time.sleep(0.05)
        signalled.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    with StopFlag().install([signal.SIGTERM]), caplog.at_level(logging.WARNING):
        threading.Thread(target=signal_once_it_is_logged, daemon=True).start()
        with pytest.raises(StoppedEarlyError, match="stopped by signal SIGTERM while waiting"):
            wait(tmp_path)
        ended = time.monotonic()
    assert any("waiting for" in line and WAITS[wait] in line for line in caplog.messages), caplog.text
    assert ended - signalled[0] < 5


def test_programs_that_a_stopped_wait_has_started_are_gone(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(waiting.WaitTimeoutError, match=r"gave up after \d+ s: a test"):
        waiting.finished(
            ["sh", "-c", f"sleep 600 & echo $! $$ >{pids}; wait"], cause="a test", limit_seconds=1.0
        )
    for pid in pids.read_text().split():
        for _ in range(100):
            with suppress(FileNotFoundError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    time.sleep(0.05)
                    continue
            break
        else:
            pytest.fail(f"process {pid} lives on")


def test_a_program_that_ends_gives_what_it_wrote() -> None:
    done = waiting.finished(["sh", "-c", "echo out; echo err >&2; exit 3"], cause="a test", limit_seconds=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


# ---- Waits that a signal must not end, or cannot.


def test_a_save_that_takes_long_is_logged_and_a_stop_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "SAY_AFTER_SECONDS", 0.3)
    with StopFlag().install([signal.SIGTERM]) as stop, caplog.at_level(logging.WARNING):
        stop.request("test")
        work = Background(lambda: time.sleep(1.5), "write the shards")
        work.wait()
        assert work.done and work.error is None
    assert "the thread that is to write the shards" in caplog.text


_TWO_RANKS = """
import sys, time
from ldmscale import waiting
waiting.SAY_AFTER_SECONDS = 0.5
from ldmscale.distributed.collectives import barrier, from_main_rank
from ldmscale.distributed.process_group import close_world, open_world
world = open_world()
from_main_rank(lambda: time.sleep(2.5))
time.sleep(2.5 * world.rank)
barrier()
close_world()
"""


@pytest.mark.distributed
def test_a_rank_that_waits_for_another_says_so() -> None:
    port = str(free_port())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", _TWO_RANKS]
    options = {"stderr": subprocess.PIPE, "text": True}
    with (
        running(command, env=os.environ | shared | {"RANK": "0", "LOCAL_RANK": "0"}, **options) as first,
        running(command, env=os.environ | shared | {"RANK": "1", "LOCAL_RANK": "1"}, **options) as second,
    ):
        assert "rank 0, which prepares what all ranks need" in second.communicate(timeout=120)[1]
        assert "other ranks, which have not come to this exchange" in first.communicate(timeout=120)[1]


_LAUNCHER = """
import logging, sys
logging.basicConfig(format="%(message)s")
from ldmscale import launcher, waiting
waiting.SAY_AFTER_SECONDS = 0.3
rank = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), sys.exit(75))); print('up', flush=True)"
sys.exit(launcher.run_ranks([sys.executable, "-c", rank + "; time.sleep(600)"], {}, 1))
"""


def test_the_launcher_says_whom_it_waits_for_after_a_signal() -> None:
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", _LAUNCHER]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert line_of(process) == "up\n"
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=60)
        assert process.returncode == 75 and "rank 0, asked to stop; training ranks save first" in text

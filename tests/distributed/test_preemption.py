"""The stop flag: signals set it and do nothing else."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ldmscale.distributed.preemption import EXIT_STOPPED, STOP_SIGNALS, StopFlag


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_is_named(number):
    with StopFlag().install() as stop:
        assert not stop.requested and not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.requested and stop.agreed()
        assert stop.reason == f"signal {number.name}"


def test_the_first_reason_is_kept():
    with StopFlag().install() as stop:
        stop.request("time limit")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "time limit"


def test_uninstalling_gives_the_handlers_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopFlag().install():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_after_a_stop_further_signals_do_not_kill_what_is_left_of_the_process():
    code = """
import os, signal
from ldmscale.distributed.preemption import StopFlag
with StopFlag().install() as stop:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "signal SIGUSR1"
os.kill(os.getpid(), signal.SIGTERM)
raise SystemExit(75)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 75


@pytest.mark.parametrize(
    ("hours", "end_in_seconds", "reason"),
    [
        (1e-6, None, "run.max_hours=1e-06 are over"),
        (1.0, 30, "the Slurm allocation ends soon"),
        (1.0, 90, None),
        (None, None, None),
    ],
)
def test_a_time_limit_asks_for_a_stop(hours, end_in_seconds, reason):
    stop = StopFlag()
    environment = {"SLURM_JOB_END_TIME": f"{int(time.time()) + end_in_seconds}"} if end_in_seconds else {}
    stop.limit(hours, 1.0, environment)
    time.sleep(0.01)
    assert stop.requested == (reason is not None) and stop.reason == reason


def test_the_status_means_try_again():
    assert EXIT_STOPPED == os.EX_TEMPFAIL == 75


def test_handlers_can_be_installed_before_torch_is_imported():
    modules = "ldmscale.distributed.preemption, ldmscale.distributed.environment, ldmscale.launcher"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    assert done.stdout.strip() == "False"

"""The stop flag: signals set it and do nothing else."""

import os
import signal
import subprocess
import sys

import pytest

from ldmscale.distributed.stop import EXIT_STOPPED, STOP_SIGNALS, StopFlag


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


def test_the_status_means_try_again():
    assert EXIT_STOPPED == os.EX_TEMPFAIL == 75


def test_handlers_can_be_installed_before_torch_is_imported():
    modules = "ldmscale.distributed.stop, ldmscale.distributed.environment, ldmscale.launcher"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""`ldmscale doctor`: two real ranks before a run, and a real run of which one rank was stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import running

CHECKOUT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_ranks_are_compared_and_a_lack_of_room_ends_with_2(ldmscale, tmp_path):
    done = ldmscale(
        "doctor", "doctor.experiment=smoke_diffusion", "doctor.measure_mib=1", cwd=tmp_path, ranks=2
    )
    assert done.returncode == 0, done.stderr
    for name in ("ranks", "matmul", "all-reduce", "clocks", "disk", "room", "device", "attention"):
        assert f"  {name} " in done.stderr, done.stderr
    done = ldmscale("doctor", "doctor.experiment=none", "run.dir=nowhere", cwd=tmp_path)
    assert (
        done.returncode == 2 and "doctor.experiment=none" in done.stderr and "run.dir=nowhere" in done.stderr
    )


def test_a_stopped_rank_is_named_within_the_timeout_and_the_doctor_tells_the_same(ldmscale, tmp_path):
    # The launcher is a process of its own: its ranks are found by their heartbeats.
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [
        sys.executable, "-m", "ldmscale.launcher", "-n", "2", "--cpu", "diffusion", "experiment=smoke",
        "train.max_steps=100000", "safety.heartbeat_seconds=0.5", "safety.step_timeout_minutes=0.3", "run.name=hung",
    ]  # fmt: skip
    run = tmp_path / "runs" / "hung"
    with running(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        stopped = json.loads((run / "heartbeat" / "rank_00001.json").read_text())["pid"]
        os.kill(stopped, signal.SIGSTOP)
        _, said = process.communicate(timeout=280)
    assert process.returncode == 70, said
    told = (run / "logs" / "rank_00000.log").read_text()
    assert re.search(
        rf"the training hangs: rank 0 has been in phase .*dead or cut off: rank 1 on .*process {stopped}",
        told,
    )
    assert "Thread" in (run / "logs" / "stacks_00000.txt").read_text()

    done = ldmscale("doctor", "run.dir=runs/hung", cwd=tmp_path)
    assert done.returncode == 0
    assert "odd ranks" in done.stderr and re.search(r"odd ranks .*rank 1", done.stderr), done.stderr
    assert "rank 0 said" in done.stderr and "training hangs" in done.stderr
    assert "there is no complete checkpoint" in done.stderr or "checksums hold" in done.stderr

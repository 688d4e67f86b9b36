"""Published first stages train at full width through the real job, on two ranks, with the discriminator on.

One of each kind here; `python -m benchmarks.first_stages` trains all nine. That all compose and count exactly is for
tests/builders to say.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_published_stage_of_each_kind_trains_three_steps_on_two_ranks(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.first_stages", "kl_f4", "vq_f16", "--size", "32"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in done.stdout.splitlines()
        if line.startswith(("| kl", "| vq"))
    ]
    assert [row[:3] for row in rows] == [["kl_f4", "55,312,063", "yes"], ["vq_f16", "69,593,371", "yes"]]
    for name, _, _, losses, judged, *_ in rows:
        assert len(losses.split(", ")) == len(judged.split(", ")) == 3, name

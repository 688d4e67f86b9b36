"""Collectives between two real gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STARTER = """
import sys
from ldmscale.launcher import run_ranks, shared_environment
import os
sys.exit(run_ranks([sys.executable, *sys.argv[1:]], shared_environment(os.environ, 2, 0), 2))
"""


@pytest.mark.distributed
def test_two_gloo_ranks_agree_in_every_collective(tmp_path):
    program = Path(__file__).with_name("ranks_collectives.py")
    done = subprocess.run(
        [sys.executable, "-c", STARTER, str(program), str(tmp_path / "noticed")],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr

"""What tests of several rooms share: running ldmscale as a user does."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def ldmscale() -> Run:
    """ldmscale(JOB, ..., cwd=PATH, ranks=N): one process, or N gloo ranks by launch/local.sh."""

    def run(*arguments: str, cwd: Path, ranks: int | None = None, timeout: int = 300):
        command = [sys.executable, "-m", "ldmscale", *arguments]
        if ranks is not None:
            command = [str(CHECKOUT / "launch" / "local.sh"), "-n", str(ranks), "--cpu", *arguments]
        environment = os.environ | {
            "PYTHONPATH": str(CHECKOUT),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run

"""Client commands of a Slurm cluster, each with a time limit."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cluster.sh")


@dataclass
class Cluster:
    """One cluster, by the environment that leads to it."""

    environment: dict[str, str]

    def ask(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def node(self, action: str, number: int) -> None:
        self.ask("bash", str(SCRIPT), action, str(number))

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait(self, number: str, states: Sequence[str], seconds: float) -> str:
        """Wait until the job is in one of `states` and return it."""
        return until(lambda: (state := self.state(number)) in states and state, seconds, f"job {number}")


def until(happened, seconds: float, what: str):
    """The first true value of `happened()`; fails after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := happened():
            return value
        time.sleep(0.25)
    pytest.fail(f"{what}: not within {seconds} s")

"""A real Slurm cluster of four nodes on this machine, for the tests of this folder.

Its packages are installed where that is allowed (root on Debian or Ubuntu); elsewhere the tests say what they lack.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from real_cluster import SCRIPT, Cluster

PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "ip": "iproute2"}
NODES = 4


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    _install()
    # The path of munge's socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")) / "c"
    environment = os.environ | {"LDM_SLURM_DIR": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}
    environment["PATH"] += ":/usr/sbin:/sbin"
    # Time for a save before preemption kills, also on a busy machine; a job that has saved goes at once.
    environment["LDM_SLURM_GRACE"] = "90"
    made = Cluster(environment)
    up = subprocess.run(
        ["bash", str(SCRIPT), "up", str(NODES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        yield made
    finally:
        subprocess.run(["bash", str(SCRIPT), "down"], env=environment, timeout=60, check=False)
        shutil.rmtree(folder.parent, ignore_errors=True)


def _install() -> None:
    search = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if not (
        lacking := {
            package for program, package in PROGRAMS.items() if not shutil.which(program, path=search)
        }
    ):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"needs {', '.join(sorted(lacking))}, and installing packages is not allowed here")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *sorted(lacking)]
    done = None
    for command in (install, ["apt-get", "update", "-q"], install):
        done = subprocess.run(
            command, env=os.environ | quiet, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode == 0 and command is install:
            return
    assert done is not None
    pytest.fail(f"could not install {lacking}: {done.stdout[-2000:]}{done.stderr[-2000:]}")

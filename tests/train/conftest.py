"""Starts the programs of this folder on several ranks, each once a session: a launch costs seconds, its claims do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 300


def launch(ranks: int, program: str, *arguments: object) -> None:
    """Run a program of this folder on gloo ranks, on a free port; fails with its output if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(HERE / program), *map(str, arguments)]
    root = HERE.parent.parent
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, f"{program} on {ranks} ranks:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


def results(folder: Path, ranks: int, program: str, *arguments: object) -> Mapping[str, Any]:
    """What rank 0 of a program wrote to the file named in its first argument."""
    path = folder / f"{Path(program).stem}_{ranks}.json"
    launch(ranks, program, path, *arguments)
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="session")
def trained_on_1(scratch: Path) -> Mapping[str, Any]:
    return results(scratch, 1, "program_training.py")


@pytest.fixture(scope="session")
def trained_on_2(scratch: Path) -> Mapping[str, Any]:
    return results(scratch, 2, "program_training.py")


@pytest.fixture(scope="session")
def straight(scratch: Path) -> Mapping[str, Any]:
    """Uninterrupted runs on 2 ranks, which save after half of their steps."""
    return results(scratch, 2, "program_resume.py", scratch / "checkpoints", "straight")


@pytest.fixture(scope="session")
def resumed_on_2(scratch: Path, straight: Mapping[str, Any]) -> Mapping[str, Any]:
    return results(scratch, 2, "program_resume.py", scratch / "checkpoints", "resume")


@pytest.fixture(scope="session")
def resumed_on_1(scratch: Path, straight: Mapping[str, Any]) -> Mapping[str, Any]:
    return results(scratch, 1, "program_resume.py", scratch / "checkpoints", "resume")


@pytest.fixture(scope="session")
def resumed_on_3(scratch: Path, straight: Mapping[str, Any]) -> Mapping[str, Any]:
    return results(scratch, 3, "program_resume.py", scratch / "checkpoints", "resume")

"""A rank that hangs writes down its last collectives before the watchdog ends it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from torch._C import _distributed_c10d as c10d

from ldmscale.distributed.flight_recorder import record_collectives
from ldmscale.distributed.watchdog import EXIT_HUNG

ROOT = Path(__file__).parents[2]
HANGING = """
import logging, sys, time
from functools import partial
from pathlib import Path
import torch
import torch.distributed as dist
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.flight_recorder import dump
from ldmscale.distributed.watchdog import Heartbeat

logging.basicConfig(level=logging.INFO)
folder = Path(sys.argv[1])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(37))
before = partial(dump, folder / "logs", 0) if sys.argv[2] == "dump" else lambda: 1 / 0
Heartbeat(folder, Ranks(), attempt=1, every_seconds=0.1, first_timeout_seconds=0.5, timeout_seconds=0.5, before_end=before)
time.sleep(60)
"""


def hang(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HANGING, str(folder), what],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(
    not hasattr(c10d, "_dump_fr_trace") or hasattr(c10d, "_dump_nccl_trace"),
    reason="this build records NCCL's collectives only",
)
def test_the_last_collectives_are_written_down(tmp_path: Path) -> None:
    done = hang(tmp_path, "dump")
    assert done.returncode == EXIT_HUNG, done.stderr
    with open(tmp_path / "logs" / "nccl_trace_rank_0", "rb") as file:
        recorded = pickle.load(file)
    assert "all_reduce" in str(recorded["entries"]) and "37" in str(recorded["entries"])


def test_the_process_ends_where_nothing_can_be_written_down(tmp_path: Path) -> None:
    done = hang(tmp_path, "fail")
    assert done.returncode == EXIT_HUNG
    assert "cannot be written down: ZeroDivisionError" in done.stderr


def test_what_the_job_set_is_kept(tmp_path: Path) -> None:
    environment = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "50", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    record_collectives(tmp_path / "logs", environment)
    assert environment["TORCH_FR_BUFFER_SIZE"] == "50" and environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "logs" / "nccl_trace_rank_")

"""Reading a checkpoint takes the memory of what is read, and little more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.checkpoint.shards import Piece

READ = """
import sys
from pathlib import Path
import torch
from ldmscale.checkpoint.shards import Reader

def resident(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) / 1024

reader = Reader(sys.argv[1])
out = torch.empty(1 << 20)
reader.fill("denoiser/master/w0", 0, out)  # what the first read loads is not the state's
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
half = {f"w{number}": torch.empty(1 << 21) for number in range(8)}  # this rank's half of each
for name, part in half.items():
    assert reader.wrong_hashes() == [] if name == "w0" else True
    reader.fill(f"denoiser/master/{name}", 1 << 21, part)
print((resident("VmHWM") - before) / (8 * 8))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is told by /proc")
def test_the_peak_is_at_most_1_3_times_the_ranks_own_state(tmp_path: Path) -> None:
    pieces = [
        Piece(f"denoiser/master/w{number}", (1 << 22,), 0, torch.full((1 << 22,), 1.0)) for number in range(8)
    ]  # 128 MiB
    folder = CheckpointManager(tmp_path).save(1, pieces, {})
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3

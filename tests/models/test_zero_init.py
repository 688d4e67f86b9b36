"""Under zero.Init networks start with the same weights, and ZeRO-3 gives the gradients of plain PyTorch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@pytest.mark.distributed
def test_sharded_networks_have_the_weights_and_gradients_of_plain_ones() -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("zero_init_worker.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    for network in ("denoiser", "class_and_map", "kl", "vq", "discriminator"):
        assert f"{network}: equal" in result.stdout

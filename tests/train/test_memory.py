"""What two ranks hold under ZeRO is what theory says, counted from the tensors by the committed benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.distributed
@pytest.mark.slow
def test_weights_gradients_and_states_are_sharded_as_each_stage_promises(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "memory.py"),
        "--ranks",
        "2",
        "--json",
        str(tmp_path / "rows"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "rows").read_text())
    assert {(row["stage"], row["rank"]) for row in rows} == {(s, r) for s in (1, 2, 3) for r in (0, 1)}
    for row in rows:
        weights, gradients, states = (m / t for m, t in zip(row["measured"], row["theory"], strict=True))
        assert weights == pytest.approx(1.0, abs=0.02) and states == pytest.approx(1.0, abs=0.02), row
        # At stage 1 DeepSpeed keeps the gradients in bf16 beside their sum in fp32.
        assert gradients == pytest.approx(1.5 if row["stage"] == 1 else 1.0, abs=0.02), row
    assert "| 2 | 3 |" in done.stdout

"""What two ranks hold under ZeRO is what theory says, counted from the tensors by the committed benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldmscale.train.dry_run import out_of_memory

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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
    ],
)  # fmt: skip
def test_full_memory_is_known_whichever_library_found_it(error: BaseException) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "text", ["CUDA error: device-side assert triggered", "CUBLAS_STATUS_NOT_INITIALIZED", "shape mismatch"]
)
def test_other_errors_are_not_taken_for_full_memory(text: str) -> None:
    assert not out_of_memory(RuntimeError(text))

"""The benchmarks run, and refuse to time what does not compute the same. No times are asserted here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.mark.slow
def test_tables_of_equal_contenders_are_printed() -> None:
    done = bench("unet_step_2", "autoencoder_backward", "--keep-memory")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    names = [row[0].strip() for row in rows if row[0].strip()]
    assert names[:2] == ["diffusers, fused", "ours, ZeRO-0"] and names.count("compvis") == 2
    figures = {row[0].strip(): [float(cell) for cell in row[1:]] for row in rows if row[0].strip()}
    assert figures["ours, ZeRO-0"][3] > 0 and figures["diffusers, fused"][3:6] == [1, 1, 1]
    # The flat update frees each gradient as it comes, and holds them all in a vector of its own.
    assert figures["ours, ZeRO-0"][6] < figures["diffusers, fused"][6]
    assert figures["ours, ZeRO-0"][7] > figures["diffusers, fused"][7]


@pytest.mark.slow
def test_contenders_that_compute_something_else_are_not_timed() -> None:
    program = """
from benchmarks.contenders import Contender
from benchmarks.contest import contest
four, two = (Contender("ours", "unet", "backward", heads=heads, quick=True) for heads in (4, 2))
contest([four, two], threads=1, seconds=1, rounds=1)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 1 and "AssertionError: ours: the output differs by" in done.stderr


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    done = bench("unet_stop")
    assert done.returncode == 2 and "no benchmark unet_stop" in done.stderr and "unet_step_8" in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_the_cost_of_checkpoints_is_told() -> None:
    done = bench("checkpointing")
    assert done.returncode == 0, done.stderr
    assert "| stall in steps |" in done.stdout and "| share of time |" in done.stdout


@pytest.mark.slow
def test_streams_of_data_are_compared_when_they_give_the_same() -> None:
    done = bench("data_images", "data_latents", "data_resume", "data_encoding", seconds=500)
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1] for line in done.stdout.splitlines() if "|" in line
    }
    for name in ("ours, turbo", "ours", "webdataset", "reading the files from end to end", "encoder alone"):
        assert float(rows[name][0].replace(",", "")) > 0
    assert float(rows["ours"][1]) == 1 and "samples" in rows

"""A GPU that is expected and cannot be used is an error with torch's own reason, never a training on the CPU."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldmscale.distributed.devices import (
    arithmetic,
    choose_device,
    describe,
    driver_version,
    fast_arithmetic,
    sign_of_gpus,
    use_device,
)
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.pinning import can_pin, host_memory, pinned
from ldmscale.errors import ConfigError

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be used here")


@CPU_ONLY
@pytest.mark.parametrize(
    "environment",
    [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "GPU-8e1f5b62"},
        {"SLURM_GPUS_ON_NODE": "8"},
        {"SLURM_JOB_GPUS": "0,3"},
        {"DS_ACCELERATOR": "cuda"},
    ],
)
def test_an_expected_gpu_that_cannot_be_used_is_an_error_with_torchs_reason(
    environment: dict[str, str],
) -> None:
    with pytest.raises((AssertionError, RuntimeError)) as reason:
        torch.cuda.init()
    with pytest.raises(ConfigError) as found:
        choose_device(Ranks(3, 8, 3, 8), environment)
    ((name, value),) = environment.items()
    assert f"{name}={value}" in str(found.value) and "DS_ACCELERATOR=cpu" in str(found.value)
    assert " ".join(str(reason.value).split()) in str(found.value)


@CPU_ONLY
@pytest.mark.parametrize(
    "environment",
    [
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {
            "CUDA_VISIBLE_DEVICES": "-1,0",
            "SLURM_JOB_GPUS": "0",
        },  # CUDA's list ends at the first entry that is none
        {"SLURM_GPUS_ON_NODE": "0"},
        {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0"},
        {"DS_ACCELERATOR": "cpu", "SLURM_GPUS_ON_NODE": "8"},
    ],
)
def test_the_cpu_is_taken_where_no_gpu_is_meant(environment: dict[str, str]) -> None:
    assert choose_device(Ranks(), environment) == torch.device("cpu")


def test_a_device_file_counts_for_builds_with_cuda_only(tmp_path: Path) -> None:
    there = tmp_path / "nvidia0"
    there.touch()
    expected = None if torch.version.cuda is None else f"{there} is there"
    assert sign_of_gpus({}, there) == expected
    assert sign_of_gpus({}, tmp_path / "absent") is None


@CPU_ONLY
def test_a_job_ends_with_status_2_where_its_gpu_cannot_be_used(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ldmscale", "diffusion", "experiment=smoke", f"run.dir={tmp_path / 'run'}"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "CUDA_VISIBLE_DEVICES=0, and torch" in done.stderr and not (tmp_path / "run").exists()


@pytest.fixture
def settings() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = flags


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_and_the_choice_of_kernels_are_set_together(allowed: bool) -> None:
    fast_arithmetic(allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed and torch.backends.cudnn.benchmark is allowed
    assert set(arithmetic().values()) == {allowed}


def test_the_cpu_is_left_as_it_is() -> None:
    environment: dict[str, str] = {}
    use_device(torch.device("cpu"), environment)
    assert environment == {} and torch.get_float32_matmul_precision() == "highest"
    assert describe(torch.device("cpu")) == f"cpu, {torch.get_num_threads()} threads per rank"


def test_the_drivers_version_is_read_from_its_kernel_module(tmp_path: Path) -> None:
    path = tmp_path / "version"
    path.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12\n"
    )
    assert driver_version(path) == "535.183.01"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert driver_version(path) == "580.65.06"
    assert driver_version(tmp_path / "absent") == "of unknown version"


@CPU_ONLY
def test_pageable_memory_takes_the_place_of_memory_that_cannot_be_locked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """torch itself refuses to lock memory here, as it does where a limit is reached."""
    with caplog.at_level(logging.WARNING):
        box = host_memory((3, 2), torch.float32, pinned=True)
        values = torch.arange(4)
        assert pinned(values) is values
    assert box.shape == (3, 2) and box.dtype == torch.float32 and not box.is_pinned()
    assert not can_pin(8)
    assert sum("no page-locked memory" in record.message for record in caplog.records) <= 2

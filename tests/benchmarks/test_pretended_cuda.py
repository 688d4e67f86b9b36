"""What benchmarks/pretended_cuda counts: known graphs, today's steps, and the networks of diffusers. No times are asserted.

Each test starts processes, because CUDA must be pretended before torch is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pretended_cuda.device import Unsupported, library

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def pretended() -> None:
    try:
        library()
    except Unsupported as reason:
        pytest.skip(str(reason))


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def counted(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What `python -m benchmarks.pretended_cuda` writes as JSON."""
    path = tmp_path / "counted.json"
    done = python("-m", "benchmarks.pretended_cuda", *arguments, "--json", str(path))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """What program_counters.py counts."""
    done = python(str(HERE / "program_counters.py"))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_counts_of_known_graphs_are_those_computed_by_hand(known: dict[str, Any]) -> None:
    found = known
    forward = found["forward"]  # relu of a linear layer 4 -> 8 on 2 rows, fp32
    assert forward["kernels_of"] == {"addmm": 1, "relu": 1} and forward["kernels"] == 2
    assert forward["teraflops"] * 1e12 == pytest.approx(2 * 2 * 4 * 8)
    # addmm reads 8 biases, 2 x 4 inputs and 4 x 8 weights and writes 2 x 8; relu reads and writes 2 x 8.
    assert forward["bytes"] == 4 * ((8 + 8 + 32 + 16) + (16 + 16))
    assert forward["notes"]["fp32 matrix product"] == 1 and forward["notes"]["wait"] == 0
    # The gradient of silu is one kernel on CUDA; that of the bias is one of the two sums.
    expected = {"addmm": 1, "silu": 1, "sum": 2, "ones_like": 1, "silu_backward": 1, "mm": 1}
    assert found["backward"]["kernels_of"] == expected
    assert found["gradient"] == ["cuda:0", [8, 4]]
    assert (found["item"], found["list"]) == (2.0, [2.0, 2.0])
    assert found["peak"] == 2 * 4096 and found["held"] == 4096 + 2048
    assert found["host"] == [2.0, 2.0] and found["of the host"] == 0


def test_each_wait_and_each_copy_is_counted_by_its_kind(known: dict[str, Any]) -> None:
    found = known
    # .item(), .tolist(), .cpu() and synchronize; the copy to the host that is not blocking is none.
    assert found["waits"]["wait"] == 4 and found["waits"]["copy to host"] == 1
    copies = {kind: count for kind, count in found["copies"].items() if count}
    # Pageable and pinned memory without non_blocking, and copy_; a slice of pinned memory is pinned.
    assert copies == {"blocking copy": 3, "pageable copy": 1, "pinned copy": 2}
    lines = {note["where"].split(":")[0] for note in found["copied"]}
    assert lines == {"program_counters.py"}
    assert sorted(note["what"] for note in found["copied"]) == [
        "40 B",
        "60 B",
        "60 B",
        "60 B",
        "60 B",
        "64 B",
    ]
    assert found["index"]["index on the host"] == 1 and found["index"]["wait"] == 0


@pytest.mark.slow
def test_our_unet_is_leaner_than_that_of_diffusers(tmp_path: Path) -> None:
    """At the sizes of the 1.45B model; a status of 0 says that no ratio is above its limit."""
    found = counted(tmp_path, "unet")
    ours, theirs = found["networks"]["ours"], found["networks"]["diffusers"]
    assert ours["parameters"] == theirs["parameters"] == 872_300_484
    # The same arithmetic, but for the projections that one of them computes as convolutions.
    assert ours["totals"]["teraflops"] == pytest.approx(theirs["totals"]["teraflops"], rel=0.01)
    assert ours["waits"] == theirs["waits"] == 0
    assert ours["totals"]["kernels_of"]["_scaled_dot_product_flash_attention_backward"] == 96
    assert theirs["totals"]["kernels_of"]["_scaled_dot_product_flash_attention_backward"] == 96
    assert theirs["totals"]["kernels_of"]["silu_backward"] == theirs["totals"]["kernels_of"]["silu"]
    # The time embedding is computed in fp32; no norm casts its map.
    assert ours["totals"]["kernels_of"]["_to_copy"] <= 8
    assert found["ratios"]["kernels"] <= 0.90 and found["ratios"]["gib_moved"] <= 0.94
    assert found["ratios"]["peak_gib"] <= 0.85 and found["ratios"]["roofline_ms"] <= 0.975


@pytest.mark.slow
def test_our_autoencoder_is_leaner_than_that_of_diffusers(tmp_path: Path) -> None:
    found = counted(tmp_path, "autoencoder")
    ours, theirs = found["networks"]["ours"], found["networks"]["diffusers"]
    assert ours["parameters"] == theirs["parameters"] == 83_653_863
    assert ours["totals"]["teraflops"] == pytest.approx(theirs["totals"]["teraflops"], rel=0.01)
    assert found["ratios"]["kernels"] <= 0.95 and found["ratios"]["gib_moved"] <= 0.95
    assert found["ratios"]["peak_gib"] <= 1.00 and found["ratios"]["roofline_ms"] <= 0.97


def test_a_ratio_above_its_limit_is_named() -> None:
    code = (
        "from benchmarks.pretended_cuda.device import pretend; pretend()\n"
        "from benchmarks.pretended_cuda.networks import LIMITS, above_limits\n"
        "assert above_limits('unet', LIMITS['unet']) == []\n"
        "print(above_limits('unet', LIMITS['unet'] | {'kernels': 1.5}))"
    )
    done = python("-c", code)
    assert "kernels is 1.500 of that of diffusers, the limit is 0.9" in done.stdout, done.stderr


@pytest.mark.slow
def test_counts_of_a_diffusion_step_are_equal_in_two_runs(tmp_path: Path) -> None:
    """No wait and no copy from pageable memory per micro-step, one wait per update, one per log interval."""
    arguments = ("diffusion-step", "--small", "--batch", "2")
    found = counted(tmp_path, *arguments)
    assert counted(tmp_path, *arguments) == found
    micro_step, update, metrics = found["phases"]
    notes = micro_step["totals"]["notes"]
    assert notes["wait"] == 0 and notes["mixed devices"] == 0 and notes["fp32 matrix product"] == 0
    # Latents, captions, noise, the posterior's noise, timesteps, dropped captions.
    assert notes["blocking copy"] == notes["pageable copy"] == 0 and notes["pinned copy"] == 6
    assert update["totals"]["notes"]["wait"] <= 1 and metrics["totals"]["notes"]["wait"] <= 1
    assert update["totals"]["notes"]["blocking copy"] == update["totals"]["notes"]["pageable copy"] == 0
    for phase in found["phases"]:
        assert phase["host_tensors"] == []
    assert update["collectives"]["all_reduce"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl_f8", "vq_f4"])
def test_a_step_of_the_autoencoder_does_not_wait(tmp_path: Path, kind: str) -> None:
    """No wait and no copy from pageable memory per micro-step, one wait per update of each of two engines."""
    settings = ("--set", f"autoencoder={kind}")
    found = counted(tmp_path, "autoencoder-step", "--small", "--batch", "1", "--side", "64", *settings)
    micro_step, update, metrics = (phase["totals"]["notes"] for phase in found["phases"])
    assert micro_step["wait"] == micro_step["blocking copy"] == micro_step["pageable copy"] == 0
    assert micro_step["mixed devices"] == 0 and update["mixed devices"] == 0
    assert update["wait"] <= 2 and update["blocking copy"] == 0 and metrics["wait"] <= 1
    layouts = found["phases"][0]["totals"]["convolution_inputs"]
    assert not any(
        layout.startswith("channels-last") for layout in layouts
    )  # a norm would convert the map back


@pytest.mark.slow
def test_no_sampler_waits_for_the_device(tmp_path: Path) -> None:
    for phase in counted(tmp_path, "samplers", "--small")["phases"]:
        notes = phase["totals"]["notes"]
        assert notes["wait"] == notes["blocking copy"] == notes["mixed devices"] == 0, phase["name"]


@pytest.mark.slow
def test_collectives_behind_deepspeed_are_counted(tmp_path: Path) -> None:
    """At ZeRO-2 every micro-step reduces all gradients once, and the update gathers all parameters once."""
    found = counted(tmp_path, "zero", "2", "--small", "--ranks", "4")
    passes = {one["name"]: one for one in found["passes"]}
    assert found["ranks"] == 4 and passes["forward"]["calls"] == {}
    assert passes["backward"]["elements"]["all_reduce"] == pytest.approx(1.0, abs=0.01)
    assert passes["update"]["elements"]["all_gather_into_tensor"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.slow
def test_deepspeed_takes_its_cuda_accelerator_and_gets_no_cpu_tensor(tmp_path: Path) -> None:
    """Records today's law at ZeRO-1: no wait per micro-step, two per update."""
    found = counted(tmp_path, "deepspeed", "1", "--small")
    assert found["accelerator"] == "cuda" and found["masters"] == ["float32 on cuda:0"]
    parts = {part["name"]: part for part in found["parts"]}
    assert all(part["host_tensors"] == [] for part in found["parts"])
    assert parts["micro-step 1 of 2"]["waits"] == parts["micro-step 2 of 2"]["waits"] == 0
    assert parts["micro-step 1 of 2"]["collectives"] == {}
    assert parts["micro-step 2 of 2"]["collectives"] == {"all_reduce": 1}
    assert parts["update"]["waits"] <= 2


def test_a_machine_that_cannot_pretend_cuda_reports_why(tmp_path: Path) -> None:
    done = python("-m", "benchmarks.pretended_cuda", "unet", PATH="/nowhere", LDMSCALE_CACHE=str(tmp_path))
    assert done.returncode == 3 and "needs g++ to compile cuda_hooks.cpp" in done.stderr
    late = python("-c", "import torch; from benchmarks.pretended_cuda.device import pretend; pretend()")
    assert late.returncode == 1 and "torch is imported already" in late.stderr
    without = python("-m", "benchmarks.pretended_cuda", "zero")
    assert without.returncode == 2 and "needs a stage" in without.stderr

"""Means over micro-batches, and the clock of the loop. Two ranks: tests/distributed."""

import subprocess
import sys
import time

import pytest
import torch

from ldmscale.tracking.metrics import MetricSums, PartialMean
from ldmscale.tracking.throughput import Throughput, peak_flops, stated_peak

CPU = torch.device("cpu")


def test_means_are_weighted_and_start_anew():
    sums = MetricSums()
    sums.add({"loss/total": torch.tensor(1.0), "lr": 0.5}, weight=1)
    sums.add({"loss/total": torch.tensor([4.0], requires_grad=True)}, weight=3)
    assert sums.mean() == {"loss/total": pytest.approx(13 / 4), "lr": 0.5}
    assert sums.mean() == {}


def test_a_mean_of_some_samples_counts_as_many_as_it_is_of():
    """So the bins of six samples are the same whether they came as one micro-batch or as two."""
    whole, cut = MetricSums(), MetricSums()
    whole.add(
        {"loss/bin_1": PartialMean(torch.tensor((1.0 + 2 + 6) / 3), 3), "loss/total": torch.tensor(4.0)}
    )
    cut.add({"loss/bin_1": PartialMean(torch.tensor(1.0), 1), "loss/total": torch.tensor(3.0)})
    cut.add({"loss/bin_1": PartialMean(torch.tensor((2.0 + 6) / 2), 2), "loss/total": torch.tensor(5.0)})
    cut.add({"loss/total": torch.tensor(4.0)})
    assert whole.mean() == {"loss/bin_1": 3.0, "loss/total": 4.0} == cut.mean()


def test_many_bf16_losses_are_summed_in_full_precision():
    sums = MetricSums()
    for _ in range(1000):
        sums.add({"loss/total": torch.tensor(1.0, dtype=torch.bfloat16)})
    # a bf16 sum would stop growing at 256
    assert sums.mean() == {"loss/total": 1.0}


def test_adding_keeps_no_graph_alive():
    sums = MetricSums()
    weight = torch.ones(3, requires_grad=True)
    sums.add({"loss/total": (weight * 2).sum()})
    assert all(not total.requires_grad for total in sums._sums.values())


def test_throughput_counts_the_images_of_all_ranks_and_leaves_pauses_out():
    began = time.perf_counter()
    clock = Throughput(CPU, ranks=2, flops_per_image=10.0, device_peak_flops=1000.0)
    for _ in range(4):
        time.sleep(0.02)
        clock.step(images=5, data_wait=0.01)
    with clock.paused():
        time.sleep(0.2)
    found = clock.report()
    assert found["time/paused_seconds"] >= 0.2
    elapsed = time.perf_counter() - began
    assert 0.02 <= found["time/step_seconds"] <= (elapsed - found["time/paused_seconds"]) / 4
    assert found["throughput/images_per_second"] == pytest.approx(5 / found["time/step_seconds"])
    assert found["time/data_wait_share"] == pytest.approx(0.01 / found["time/step_seconds"])
    assert found["throughput/device_tflops"] == pytest.approx(found["throughput/images_per_second"] * 5e-12)
    assert found["throughput/mfu"] == pytest.approx(found["throughput/images_per_second"] * 10 / 2000)


def test_a_report_without_steps_has_no_rates():
    clock = Throughput(CPU)
    assert set(clock.report()) == {"memory/peak_gib"}


def test_mfu_is_absent_where_the_peak_is_not_known():
    clock = Throughput(CPU, flops_per_image=10.0, device_peak_flops=peak_flops(CPU, "bf16"))
    clock.step(1, 0.0)
    assert "throughput/mfu" not in clock.report()


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [  # as CUDA names the devices; NVIDIA's data sheets, bf16 without sparsity
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None),  # once an A100
        ("NVIDIA RTX A5000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_device_has_the_peak_of_its_own_name(name, teraflops):
    peak = stated_peak(name)
    assert peak == (None if teraflops is None else pytest.approx(1e12 * teraflops))


GROW = """
import torch
from ldmscale.tracking.throughput import memory_peaks
before = memory_peaks(torch.device("cpu"))["memory/peak_gib"]
block = bytearray(2**28)
block[::4096] = b"x" * len(block[::4096])
print(before, memory_peaks(torch.device("cpu"))["memory/peak_gib"])
"""


def test_memory_is_that_of_this_process():
    done = subprocess.run(
        [sys.executable, "-c", GROW], capture_output=True, text=True, check=True, timeout=240
    )
    before, after = map(float, done.stdout.split())
    assert 0.05 < before < 2
    assert 0.2 < after - before < 0.4

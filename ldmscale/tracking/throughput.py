"""How fast, how idle, how full: images a second, share of time waiting for data, memory, and MFU where it can
be known.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_GIB = 2**30

# Dense bf16 matrix FLOP/s of one device as its maker states them (without sparsity, fp32 accumulation), by words of the
# device's name. Variants of other speed have entries of their own: "H100 PCIe" has slower memory and clocks than "H100".
_PEAK_BF16_FLOPS = {
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A800": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H20": 148e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "GB300": 2500e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX A4000": 76.7e12,
    "RTX A4500": 94.6e12,
    "RTX A5000": 111.1e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364e12,
}
# Words of slower or faster variants, and of a part of a device.
_VARIANTS = {"LAPTOP", "MAX", "MOBILE", "TI", "SUPER", "D", "MIG"}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Stated FLOP/s of `device` in bf16; None for other precisions, for CPUs and for unknown devices."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return stated_peak(torch.cuda.get_device_name(device))


def stated_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that CUDA calls `name`; None where it is not known.

    Whole words count: an L40 is no L4, and an RTX A1000 no A100.
    """
    words = set(re.findall(r"[A-Z0-9]+", name.upper()))
    if words & _VARIANTS:
        return None
    fitting = [entry for entry in _PEAK_BF16_FLOPS if set(entry.upper().split()) <= words]
    if not fitting:
        return None
    return _PEAK_BF16_FLOPS[max(fitting, key=lambda entry: len(entry.split()))]


class Throughput:
    """Clock of the training loop on this rank: call `step` after each optimiser step and `report` once a log
    interval.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        ranks: int = 1,
        flops_per_image: float | None = None,
        device_peak_flops: float | None = None,
    ) -> None:
        """`flops_per_image`: forward and backward of one image, without recomputation; both FLOP figures are
        needed for MFU, this one for TFLOP/s.
        """
        self._device = device
        self._flops_per_image = None if flops_per_image is None else flops_per_image / ranks
        self._flops_share = None
        if flops_per_image and device_peak_flops:
            self._flops_share = flops_per_image / (device_peak_flops * ranks)
        self._begin()

    def _begin(self) -> None:
        self._start = time.perf_counter()
        self._paused = 0.0
        self._waited = 0.0
        self._images = 0
        self._steps = 0

    def step(self, images: int, data_wait: float) -> None:
        """Count one optimiser step of `images` images over all ranks, for which this rank waited `data_wait`
        seconds.
        """
        self._images += images
        self._steps += 1
        self._waited += data_wait

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in this block (saving, drawing pictures) does not count as training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def report(self) -> dict[str, float]:
        """Metrics of the steps since the last report; then start anew. Only memory if there was no step.

        throughput/images_per_second, throughput/device_tflops (10^12 FLOP/s of one rank's device),
        throughput/mfu (0 to 1), time/step_seconds, time/data_wait_share (0 to
        1), time/paused_seconds, memory/peak_gib (of the GPU, else of the process) and, with a GPU,
        memory/host_peak_gib.
        """
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        metrics: dict[str, float] = {}
        if self._steps:
            metrics["throughput/images_per_second"] = self._images / seconds
            metrics["time/step_seconds"] = seconds / self._steps
            metrics["time/data_wait_share"] = min(self._waited / seconds, 1.0)
            if self._flops_per_image is not None:
                metrics["throughput/device_tflops"] = self._images / seconds * self._flops_per_image / 1e12
            if self._flops_share is not None:
                metrics["throughput/mfu"] = self._images / seconds * self._flops_share
        if self._paused:
            metrics["time/paused_seconds"] = self._paused
        metrics.update(memory_peaks(self._device))
        self._begin()
        return metrics


def memory_peaks(device: torch.device) -> dict[str, float]:
    """Largest memory in use so far, in GiB: of the GPU and of the process, or of the process on a CPU."""
    host = _peak_resident_bytes() / _GIB
    if device.type != "cuda":
        return {"memory/peak_gib": host}
    return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / _GIB, "memory/host_peak_gib": host}


def _peak_resident_bytes() -> int:
    # getrusage would do, but on Linux its figure starts at the size of the process that started this one.
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

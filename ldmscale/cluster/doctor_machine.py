"""The ranks before a run: versions, devices, arithmetic and all-reduce rate of each, clocks. Collective."""

from __future__ import annotations

import importlib.metadata
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ldmscale.cluster.doctor_run import Findings
from ldmscale.distributed.collectives import barrier, gather_lists
from ldmscale.distributed.process_group import World

PACKAGES = ("ldmscale", "torch", "deepspeed", "xformers", "webdataset", "transformers", "wandb", "fsspec")
_CLOCK_SECONDS = 2.0  # of difference; object stores refuse requests of clocks that are minutes off
_REPEATS = 5


@dataclass(frozen=True)
class RankFacts:
    """What one rank measured of itself."""

    rank: int
    host: str
    device: str
    versions: str
    matmul_gflops: float
    all_reduce_gib_per_second: float
    clock: float  # seconds since the epoch, all ranks asked at the same moment


def examine(world: World, measure_mib: int, slow_share: float) -> Findings:
    """Measure every rank and compare them."""
    barrier()
    clock = time.time()
    facts = gather_lists(
        [
            RankFacts(
                world.rank,
                socket.gethostname(),
                _device_name(world.device),
                _versions(),
                _matmul_gflops(world.device),
                _all_reduce_rate(world, measure_mib),
                clock,
            )
        ]
    )
    return compare(facts, slow_share)


def compare(facts: Sequence[RankFacts], slow_share: float) -> Findings:
    """What differs between ranks that should be equal."""
    found = Findings()
    hosts = {fact.host for fact in facts}
    found.values["ranks"] = f"{len(facts)} on {len(hosts)} host{'s' if len(hosts) > 1 else ''}"
    found.values["devices"] = ", ".join(sorted({fact.device for fact in facts}))
    found.values["versions"] = facts[0].versions
    found.values["matmul"] = _spread([fact.matmul_gflops / 1000 for fact in facts], "TFLOP/s a rank")
    if len(facts) > 1:
        rates = [fact.all_reduce_gib_per_second for fact in facts]
        found.values["all-reduce"] = _spread(rates, "GiB/s a rank")
        skew = max(fact.clock for fact in facts) - min(fact.clock for fact in facts)
        found.values["clocks"] = f"within {skew:.2f} s"
        if skew > _CLOCK_SECONDS:
            found.warnings.append(
                f"clocks differ by {skew:.1f} s between hosts: object stores may refuse their requests; is NTP running?"
            )
    for other in facts:
        if other.versions != facts[0].versions:
            found.faults.append(
                f"rank {other.rank} on {other.host} has {other.versions}, rank 0 has {facts[0].versions}: use one environment"
            )
        if other.device != facts[0].device:
            found.warnings.append(
                f"rank {other.rank} on {other.host} computes on {other.device}, rank 0 on {facts[0].device}"
            )
    median = statistics.median(fact.matmul_gflops for fact in facts)
    for slow in facts:
        if slow.matmul_gflops < slow_share * median:
            found.warnings.append(
                f"rank {slow.rank} on {slow.host} computes at {slow.matmul_gflops / median:.0%} of the median rate: every "
                f"rank will wait for it; leave the host out (cluster.exclude=[{slow.host}]) if it stays so"
            )
    return found


def _matmul_gflops(device: torch.device) -> float:
    size = 4096 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind(0)
    best = float("inf")
    for _ in range(_REPEATS + 1):
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def _all_reduce_rate(world: World, measure_mib: int) -> float:
    """GiB of payload a second; 0 for a rank alone."""
    if world.size == 1:
        return 0.0
    payload = torch.ones(measure_mib * 2**18, device=world.device)
    times = []
    for _ in range(_REPEATS):
        payload.fill_(1.0)
        barrier()
        _wait(world.device)
        began = time.perf_counter()
        dist.all_reduce(payload)
        _wait(world.device)
        times.append(time.perf_counter() - began)
        if payload[0].item() != world.size:
            raise RuntimeError(f"an all-reduce of ones over {world.size} ranks gave {payload[0].item()}")
    return measure_mib / 1024 / statistics.median(times)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB)"
    return f"CPU ({torch.get_num_threads()} threads a rank)"


def _versions() -> str:
    found = [f"Python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    return ", ".join(found)


def _spread(values: Sequence[float], unit: str) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g} {unit}"
    return f"{statistics.median(values):.3g} {unit} (from {min(values):.3g} to {max(values):.3g})"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""The machine before a run: ranks, disk, and object store.

Ranks (collective): versions, devices, arithmetic and all-reduce rate of each, clocks. Disk and store: whether the folder
is writable and fast, has room for the checkpoints, and the shards can be read.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ldmscale.cluster.doctor_run import Findings
from ldmscale.data.shards.urls import is_local, local_path
from ldmscale.distributed.collectives import barrier, gather_lists
from ldmscale.distributed.process_group import World
from ldmscale.errors import DataError
from ldmscale.storage.object_store import Storage

PACKAGES = ("ldmscale", "torch", "deepspeed", "xformers", "webdataset", "transformers", "wandb", "fsspec")
_CLOCK_SECONDS = 2.0  # of difference; object stores refuse requests of clocks that are minutes off
_REPEATS = 5


_BYTES_PER_PARAMETER = 16  # fp32 master, two Adam states, one average


_READ_BYTES = 16 * 2**20


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


def examine_folder(folder: Path, measure_mib: int) -> Findings:
    """Write, read and delete a file in `folder`, which is made if it is missing."""
    found = Findings()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written, read = _disk_rates(folder, measure_mib)
    except OSError as error:
        found.faults.append(
            f"{folder} cannot be written ({error.strerror or error}): give another doctor.folder or run.dir"
        )
        return found
    found.values["disk"] = (
        f"{folder}: {written:.0f} MiB/s written and on the disk, {read:.0f} MiB/s read back"
    )
    return found


def examine_room(folder: Path, parameters: int, keep: int) -> Findings:
    """Is there room for `keep` checkpoints of `parameters`, and the one that is being written?"""
    found = Findings()
    one = parameters * _BYTES_PER_PARAMETER
    need, free = one * (keep + 1), shutil.disk_usage(folder).free
    found.values["room"] = (
        f"{free / 2**30:.1f} GiB free; a checkpoint of {parameters:,} parameters takes {one / 2**30:.1f} GiB, {keep} and the "
        f"next one {need / 2**30:.1f}"
    )
    if need > free:
        found.faults.append(
            f"{folder} has {free / 2**30:.1f} GiB free and {need / 2**30:.1f} are needed: free some, or give another run.dir"
        )
    return found


def examine_shards(shards: Sequence[str], probes: int, storage: Storage) -> Findings:
    """Open evenly chosen shards and read the beginning of each."""
    found = Findings()
    count = min(probes, len(shards))
    chosen = [shards[number * (len(shards) - 1) // max(1, count - 1)] for number in range(count)]
    amount, began = 0, time.perf_counter()
    for url in dict.fromkeys(chosen):
        try:
            head = _beginning(url, storage)
        except OSError as error:
            found.faults.append(f"{url} cannot be read: {error.strerror or error}")
            continue
        except DataError as error:
            found.faults.append(f"{url} cannot be read: {error}")
            continue
        amount += len(head)
        if not head:
            found.faults.append(f"{url} is empty")
    seconds = time.perf_counter() - began
    found.values["shards"] = (
        f"{len(shards)}, of which {len(set(chosen))} were opened: {amount / 2**20 / seconds:.0f} MiB/s"
    )
    return found


def _beginning(url: str, storage: Storage) -> bytes:
    if is_local(url):
        with open(local_path(url), "rb") as file:
            return file.read(_READ_BYTES)
    return storage.read(url, 0, min(_READ_BYTES, int(storage.info(url).get("size") or 0)))


def _disk_rates(folder: Path, measure_mib: int) -> tuple[float, float]:
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        began = time.perf_counter()
        for _ in range(measure_mib):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = measure_mib / (time.perf_counter() - began)
        # Not from the page cache, where the system lets us ask for that.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(2**20):
            pass
        return written, measure_mib / (time.perf_counter() - began)

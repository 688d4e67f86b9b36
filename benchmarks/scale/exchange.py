"""A world of N gloo ranks on this machine: what a rank needs, and what the small exchanges of a step cost.

A ring needs 2 (N - 1) hops, so times grow with N; here all ranks share the cores, which makes them grow faster.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

_STEP_SECONDS = 0.1  # in which the host waits for the device


@dataclass(frozen=True)
class Exchanged:
    """Of rank 0."""

    ranks: int
    descriptors: int  # that the group opened in this process
    store_bytes: int  # addresses of all ranks
    join_seconds: float
    all_reduce_ms: float  # of 4 numbers
    barrier_ms: float
    broadcast_object_ms: float
    gather_objects_ms: float  # 12 metrics of each rank
    step_at_once_ms: float  # a step of 100 ms whose all-reduce is waited for at once,
    step_later_ms: float  # or one step later


def measure(ranks: int, *, repeats: int = 30, steps: int = 10, lazy: bool = False) -> Exchanged:
    """Starts the ranks as processes.

    Args:
        repeats: of each exchange.
        steps: of 0.1 s for the last two numbers; 0 leaves them out.
        lazy: gloo connects two ranks when they first talk (TORCH_GLOO_LAZY_INIT).
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ["TORCH_GLOO_LAZY_INIT"] = "1" if lazy else "0"
        try:
            start_processes(
                _rank, (ranks, folder, repeats, steps), nprocs=ranks, start_method="spawn", join=True
            )
        finally:
            del os.environ["TORCH_GLOO_LAZY_INIT"]
        return Exchanged(**json.loads((Path(folder) / "found.json").read_text()))


def _rank(rank: int, ranks: int, folder: str, repeats: int, steps: int) -> None:
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/fd"))
    begin = time.perf_counter()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", ranks),  # type: ignore[attr-defined]
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )
    dist.barrier()
    joined = time.perf_counter() - begin
    opened = len(os.listdir("/proc/self/fd")) - before
    size = os.path.getsize(f"{folder}/store")
    box = torch.zeros(4, dtype=torch.float64)
    metrics = [("loss/total", 0.1)] * 12
    found = {
        "ranks": ranks,
        "descriptors": opened,
        "store_bytes": size,
        "join_seconds": joined,
        "all_reduce_ms": _mean_ms(lambda: dist.all_reduce(box), repeats),
        "barrier_ms": _mean_ms(dist.barrier, repeats),
        "broadcast_object_ms": _mean_ms(lambda: dist.broadcast_object_list([{"a": 1}], src=0), repeats),
        "gather_objects_ms": _mean_ms(lambda: dist.all_gather_object([None] * ranks, metrics), repeats),
        "step_at_once_ms": _step_ms(steps, later=False),
        "step_later_ms": _step_ms(steps, later=True),
    }
    dist.barrier()
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _mean_ms(work: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        work()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begin) / repeats * 1e3


def _step_ms(steps: int, *, later: bool) -> float:
    """Mean time of a step with one all-reduce of flags."""
    if not steps:
        return 0.0
    dist.barrier()
    begin = time.perf_counter()
    pending = None
    for _ in range(steps):
        work = dist.all_reduce(torch.zeros(8, dtype=torch.float64), async_op=True)
        if later:
            time.sleep(_STEP_SECONDS)
            if pending is not None:
                pending.wait()
            pending = work
        else:
            work.wait()
            time.sleep(_STEP_SECONDS)
    if pending is not None:
        pending.wait()
    return (time.perf_counter() - begin) / steps * 1e3

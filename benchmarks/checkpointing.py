"""What checkpoints cost: `python -m benchmarks.checkpointing [--quick]` trains a network of 100 M parameters on two ranks
with a save every 50 steps, and prints the stall of a save beside a step and the share of time that saves took.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.distributed.collectives import any_true_of, max_over_ranks
from ldmscale.launcher import run_ranks, shared_environment
from ldmscale.train.engine.engine import Engine, sharded_construction
from ldmscale.train.engine.options import EngineOptions
from ldmscale.train.engine.process import connect, disconnect
from ldmscale.train.snapshot import HostCopies, snapshot

EVERY = 50


def rank(folder: Path, width: int, layers: int, batch: int, steps: int, zero: int) -> None:
    connect(torch.device("cpu"))
    torch.manual_seed(0)
    options = EngineOptions(zero_stage=zero, precision="fp32", rank_micro_batch=batch)
    with sharded_construction(options):
        network = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    engine = Engine("network", network, options, torch.device("cpu"))
    manager, copies = CheckpointManager(folder), HostCopies()
    x = torch.randn(batch, width)
    plain: list[float] = []  # steps beside which nothing is written
    beside: list[float] = []  # steps while a save is being written
    stalls: list[float] = []
    for step in range(1, steps + 1):
        written = any(manager.busy)  # also where the last file is there before the step ends
        began = time.perf_counter()
        engine.backward(engine(x).square().mean())
        engine.step()
        _, saving, _ = any_true_of(False, *manager.busy)
        manager.advance(saving)
        (beside if saving or written else plain).append(time.perf_counter() - began)
        if step % EVERY == 0:
            began = time.perf_counter()
            manager.finish()
            pieces, state = snapshot({"network": engine}, {}, copies)
            manager.begin(step, pieces, state)
            stalls.append(max_over_ranks(time.perf_counter() - began))
    manager.finish(must_hold=True)
    if dist.get_rank() == 0:
        usual = statistics.median(plain)
        slower = sum(max(0.0, seconds - usual) for seconds in beside)
        share = (sum(stalls) + slower) / (sum(plain) + sum(beside) + sum(stalls))
        sys.stdout.write(
            f"{engine.parameter_count() / 1e6:.0f} M parameters, ZeRO-{zero}, {dist.get_world_size()} ranks, a save every "
            f"{EVERY} steps\n\n| | |\n|---|---:|\n| step | {usual:.3f} s |\n"
            f"| first stall (memory is new) | {stalls[0]:.3f} s |\n"
            f"| later stalls, median | {statistics.median(stalls[1:]):.3f} s |\n"
            f"| stall in steps | {statistics.median(stalls[1:]) / usual:.2f} |\n"
            f"| steps beside a save | {len(beside)}, {slower:.3f} s slower in all |\n"
            f"| share of time | {100 * share:.2f} % |\n"
        )
    disconnect()


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpointing", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny network: does it work?")
    parser.add_argument("--zero", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4 * EVERY)
    parser.add_argument("--batch", type=int, default=64)
    chosen = parser.parse_args()
    width, layers = (64, 4) if chosen.quick else (2880, 12)
    if "RANK" in os.environ:
        rank(Path(os.environ["BENCH_FOLDER"]), width, layers, chosen.batch, chosen.steps, chosen.zero)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        environment = shared_environment(os.environ | {"BENCH_FOLDER": folder}, 2, 0)
        return run_ranks([sys.executable, "-m", "benchmarks.checkpointing", *sys.argv[1:]], environment, 2)


if __name__ == "__main__":
    sys.exit(main())

"""Bytes of weights, gradients and optimiser states on each rank under ZeRO, measured beside theory.

    python benchmarks/memory.py                       a table for 1, 2 and 4 ranks and ZeRO-1, 2 and 3
    python benchmarks/memory.py --ranks 2 --stages 3

The network is a U-Net of 8 M parameters with all of them sharded at ZeRO-3 (persistence threshold 0). Needs no GPU.
docs/memory.md has the table, and the check of the 1.45B model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def worker(stages: list[int], precision: str, out: str) -> None:
    """One rank: train one step at each stage and report what it holds."""
    import torch
    import torch.distributed as dist

    from ldmscale.distributed.collectives import gather_lists
    from ldmscale.models.unet import UNet
    from ldmscale.train.dry_run import expected, measured
    from ldmscale.train.engine.engine import Engine, sharded_construction
    from ldmscale.train.engine.options import EngineOptions
    from ldmscale.train.engine.process import connect, disconnect

    device = torch.device("cpu")
    connect(device)
    ranks, rows = dist.get_world_size(), []
    for stage in stages:
        options = EngineOptions(
            zero_stage=stage,
            precision=precision,
            rank_micro_batch=1,
            gradient_clip_norm=1.0,
            persistence_threshold=0,
        )
        torch.manual_seed(0)
        with sharded_construction(options):
            network = UNet(
                in_channels=4, out_channels=4, channels=96, channel_mult=(1, 2), blocks_per_level=1,
                attention_levels=(1,), heads=4,
            )  # fmt: skip
        engine = Engine("unet", network, options, device)
        for step in range(2):
            x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(step)).to(
                options.compute_dtype
            )
            loss = engine(x, torch.tensor([500])).float().square().mean()
            engine.backward(loss)
            held = measured(engine)  # gradients are there, and in the second step the moments
            engine.step()
        theory = expected(engine.parameter_count(), ranks, stage, precision)
        for rank, (weights, gradients, states) in enumerate(
            gather_lists([(held.weights, held.gradients, held.states)])
        ):
            rows.append(
                {
                    "ranks": ranks, "stage": stage, "rank": rank, "parameters": engine.parameter_count(),
                    "measured": [weights, gradients, states],
                    "theory": [theory.weights, theory.gradients, theory.states],
                }
            )  # fmt: skip
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(rows))
    disconnect()


def measure(ranks: int, stages: list[int], precision: str) -> list[dict]:
    """Start the ranks and return the rows that they measured."""
    from ldmscale.launcher import run_ranks, shared_environment

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--worker", str(out), "--precision", precision]
        command += ["--stages", *map(str, stages)]
        environment = dict(os.environ) | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        status = run_ranks(command, shared_environment(environment, ranks, 0), ranks)
        if status:
            sys.exit(status)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--json", help="also write all rows here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen.stages, chosen.precision, chosen.worker)
        return
    rows = [row for ranks in chosen.ranks for row in measure(ranks, chosen.stages, chosen.precision)]
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(rows))
    print(
        f"{rows[0]['parameters']:,} parameters, {chosen.precision}; MiB on the fullest rank, measured / theory\n"
    )
    print("| ranks | ZeRO | weights | gradients | masters and moments | sum |\n|---|---|---|---|---|---|")
    for ranks, stage in dict.fromkeys((row["ranks"], row["stage"]) for row in rows):
        mine = [row for row in rows if (row["ranks"], row["stage"]) == (ranks, stage)]
        fullest = max(mine, key=lambda row: sum(row["measured"]))
        pairs = list(zip(fullest["measured"], fullest["theory"], strict=True))
        pairs.append((sum(fullest["measured"]), sum(fullest["theory"])))
        cells = " | ".join(f"{one / MIB:.1f} / {other / MIB:.1f}" for one, other in pairs)
        print(f"| {ranks} | {stage} | {cells} |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()

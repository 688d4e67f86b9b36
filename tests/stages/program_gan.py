"""Run on each rank: the autoencoder stage under several ZeRO stages; rank 0 writes what the cases found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import codebook_case
import gan_case as case
import torch.distributed as dist
from gan_stage import DEVICE, batch, stage_of

from ldmscale.distributed.collectives import mean_over_ranks
from ldmscale.train.engine.process import connect, disconnect


def trained(setting: case.Case, zero: int) -> list[dict[str, float]]:
    stage = stage_of(setting, zero)
    found = []
    for step in range(case.STEPS):
        sums: dict[str, list[float]] = {}
        active = stage.active(step)
        for number in range(case.PASSES):
            loss, metrics = stage.micro_step(batch(step, number), step)
            for name, value in {"loss/total": loss, **metrics}.items():
                sums.setdefault(name, []).append(float(value))
            for name in active:
                stage.engines[name].step()
        each = {name: sum(values) / len(values) for name, values in sums.items()}
        own = each.get("gan/adaptive_weight", 0.0)
        found.append(mean_over_ranks(each))
        for name in active:
            found[-1][f"{name}/gradient_norm"] = stage.engines[name].gradient_norm()
        weights: list[float | None] = [None] * dist.get_world_size()
        dist.all_gather_object(weights, own)
        found[-1]["weights_differ"] = float(len(set(weights)) > 1)
    return found


def scaled(setting: case.Case, zero: int) -> dict[str, Any] | None:
    """The scale of the untrained network's latents, which is the same network on any number of ranks."""
    stage = stage_of(setting, zero)
    stage.finish()
    return stage.latent_statistics


def main() -> None:
    connect(DEVICE)
    out: dict[str, Any] = {}
    path = Path(sys.argv[1])
    for wanted in sys.argv[2:]:
        kind, norm, zero = wanted.split("-")
        if kind == "codebook":
            out[wanted] = codebook_case.found(int(zero), path.parent / f"checkpoints_{zero}")
        elif kind == "scale":
            out[wanted] = scaled(case.Case("kl", norm), int(zero))
        else:
            out[wanted] = trained(case.Case(kind, norm), int(zero))
    if dist.get_rank() == 0:
        path.write_text(json.dumps(out), encoding="utf-8")
    disconnect()


main()

"""A codebook that starts at k-means and is revived, on this rank; its second half once more from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gan_case as case
import torch
import torch.distributed as dist
from gan_stage import batch, stage_of

from ldmscale.checkpoint.manager import CheckpointManager
from ldmscale.config.schema.losses import CodebookConfig
from ldmscale.distributed.collectives import gather_lists
from ldmscale.stages.autoencoder import AutoencoderStage
from ldmscale.stages.codebook import PARAMETER
from ldmscale.train.snapshot import restore, snapshot

ROUNDS, REVIVE = 4, 3
# alarmed at every usage below 1
OPTIONS = CodebookConfig(
    start="kmeans", kmeans_rounds=ROUNDS, revive_after_steps=REVIVE, usage_window_steps=4, alarm_usage=1.0
)
SETTING = case.Case("vq", "group")


def table_of(stage: AutoencoderStage, kind: str = "master") -> list[list[float]]:
    """The codebook (or its average, or a moment of its optimiser) put together from all ranks' shards: [24][3]."""
    engine = stage.engines["generator"]
    pieces: list[tuple[int, list[float]]] = []
    for fragment in engine.fragments():
        if fragment.name == PARAMETER:
            tensor = engine.masters[fragment.flat]
            if kind == "ema":
                tensor = stage.averages["generator"][0].averages[fragment.flat]
            elif kind != "master":
                tensor = engine.base_optimizer.state[tensor][kind]
            pieces.append((fragment.offset, fragment.of(tensor).tolist()))
    values = dict(gather_lists(pieces))
    flat = [value for offset in sorted(values) for value in values[offset]]
    rows: list[list[float]] = torch.tensor(flat, dtype=torch.float64).view(24, 3).tolist()
    return rows


def latents_of(stage: AutoencoderStage, step: int) -> tuple[torch.Tensor, list[int], dict[int, Any]]:
    """This rank's latents of a step's first pass, their positions, and those of all ranks by position."""
    own = batch(step, 0)
    positions = own["position"].tolist()
    latents = stage._latents(stage._images(own))
    return latents, positions, dict(gather_lists(list(zip(positions, latents.tolist(), strict=True))))


def run(stage: AutoencoderStage, first: int, last: int) -> list[dict[str, float]]:
    found = []
    for step in range(first, last):
        for number in range(case.PASSES):
            _, metrics = stage.micro_step(batch(step, number), step)
            for name in stage.active(step):
                if stage.engines[name].step():
                    for average in stage.averages.get(name, ()):
                        average.update()
        found.append({name: float(value) for name, value in metrics.items()})
    return found


def found(zero: int, folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    stage = stage_of(SETTING, zero, OPTIONS, ema=0.9)
    keeper = stage.codebook
    assert keeper is not None
    latents, positions, out["latents"] = latents_of(stage, 0)
    keeper.prepare(0, positions, lambda: latents)
    out["kmeans"], out["kmeans_ema"] = table_of(stage), table_of(stage, "ema")
    with torch.no_grad():
        codes = stage.engines["generator"].network(stage._images(batch(0, 0)), None)[1]
    out["forward"] = [
        codes.quantized.movedim(1, -1).reshape(-1, 3).tolist(),
        codes.indices.flatten().tolist(),
    ]
    out["metrics"] = run(stage, 0, REVIVE)
    out["idle"] = keeper.idle.tolist()
    keeper.idle[:5] = REVIVE  # the table is small: most rows are in use
    before = table_of(stage)
    latents, positions, out["latents_then"] = latents_of(stage, REVIVE)
    keeper.prepare(REVIVE, positions, lambda: latents)
    out["dead"] = [row for row, idle in enumerate(out["idle"]) if row < 5 or idle >= REVIVE]
    out["before"], out["revived"] = before, table_of(stage)
    out["revived_ema"], out["moments"] = table_of(stage, "ema"), table_of(stage, "exp_avg")
    out["metrics"] += run(stage, REVIVE, REVIVE + 1)
    keeper.idle[7:9] = 2 * REVIVE  # dead at the next revival, which lies behind the checkpoint
    manager = CheckpointManager(folder)
    pieces, description = snapshot(stage.engines, stage.averages)
    saved = manager.save(REVIVE + 1, pieces, description | {"stage": stage.state()})
    out["straight"] = run(stage, REVIVE + 1, 2 * REVIVE + 2)
    again = stage_of(SETTING, zero, OPTIONS, ema=0.9)
    again.restore(restore(saved, again.engines, again.averages)["stage"])
    out["resumed"] = run(again, REVIVE + 1, 2 * REVIVE + 2)
    kept = table_of(again), again.state()
    keeper_again = again.codebook
    assert keeper_again is not None
    with again.engines["generator"].rehearsal(), again.engines["discriminator"].rehearsal():
        again.micro_step(batch(0, 0), 3 * REVIVE)
    out["rehearsal_changes"] = kept != (table_of(again), again.state()) or bool(keeper_again._passes)
    out["tables"] = [table_of(stage), table_of(again)]
    differ: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(differ, keeper.idle.tolist())
    out["ranks_differ"] = any(idle != differ[0] for idle in differ)
    return out

"""The loss on held-out samples with fixed noise and timesteps: a curve without the noise of the training loss.

Each sample has its own noise and timestep, functions of its number alone, and captions are never dropped. So the value
is the same on any number of ranks, and two runs on the same samples can be compared. It is the plain mean squared error
whatever weighting trains the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmscale.diffusion import process
from ldmscale.diffusion.schedule import NoiseSchedule
from ldmscale.distributed.collectives import gather_lists
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.evaluation_mode import evaluation_mode
from ldmscale.stages.conditions import batch_conditions
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.objective import Objective, add_noise
from ldmscale.train.engine.ema import ShardedEma
from ldmscale.train.engine.engine import Engine
from ldmscale.train.stage import Batch

SEED = 20_220_408  # of noise and posterior, the same in every run
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class HeldOut:
    """This rank's share of the held-out samples. All ranks have equally many micro-batches."""

    batches: Sequence[Batch]  # positions from `samples` on are padding
    samples: int  # of all ranks
    timestep_bins: int


def spread_timesteps(positions: Sequence[int], count: int) -> Tensor:
    """A timestep for each sample, int64 [B]: multiples of the golden ratio cover [0, count) evenly at any length."""
    return torch.tensor([int((position + 0.5) * _GOLDEN % 1.0 * count) for position in positions])


@torch.no_grad()
def held_out_loss(
    held_out: HeldOut,
    engine: Engine,
    averages: Sequence[ShardedEma],
    first_stage: FirstStage,
    schedule: NoiseSchedule,
    prediction: str,
    device: torch.device,
) -> dict[str, float]:
    """ "raw/loss", the same by each average ("ema/loss"), and by ranges of the timesteps. Collective."""
    network = engine.network
    assert isinstance(network, Denoiser)
    objective = Objective(prediction, "l2", caption_dropout=0.0)
    measured: dict[str, float] = {}
    for average in (None, *averages):
        found: list[tuple[int, int, float]] = []  # number, timestep, loss of each sample
        with evaluation_mode(network), engine.averaged_weights(average):
            for batch in held_out.batches:
                numbers = batch["position"].tolist()
                x0 = first_stage.batch_latents(batch, SEED)  # [B,C,h,w]
                timesteps = spread_timesteps(numbers, schedule.timesteps)
                noisy = add_noise(objective, schedule, x0, numbers, SEED, timesteps)
                conditions = batch_conditions(batch, first_stage).to(device)
                output = network(noisy.x_t.to(engine.compute_dtype), noisy.t, conditions, None)
                losses = process.loss_per_sample(output, noisy.wanted, "l2").tolist()
                found += zip(numbers, timesteps.tolist(), losses, strict=True)
        # Summed in the order of the samples, so that the sharing out does not show even in the last digit.
        rows = sorted(row for row in gather_lists(found) if row[0] < held_out.samples)
        name = "raw" if average is None else average.kind
        measured[f"{name}/loss"] = _mean([loss for _, _, loss in rows])
        for k in range(held_out.timestep_bins):
            inside = [loss for _, t, loss in rows if t * held_out.timestep_bins // schedule.timesteps == k]
            if inside:
                measured[f"{name}/bin_{k + 1}"] = _mean(inside)
    return measured


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)

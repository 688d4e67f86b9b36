"""Measures a diffusion model on held-out samples: the loss, and figures of generated images.

The loss uses fixed noise and timesteps, functions of a sample's number alone, and captions are never dropped. So the
value is the same on any number of ranks, and two runs on the same samples can be compared. It is the plain mean squared
error whatever weighting trains the network.

One image is generated per held-out sample, under its own condition, by all ranks together. The Frechet distance in a
network's features compares the set with the held-out images. The share of generated images whose nearest held-out image
is that of their own sample shows whether the condition has an effect; chance is one over the number of samples. The
held-out images are compared as the autoencoder decodes them, so that its errors do not count. Features are ordered by
sample, so the number of ranks changes nothing but the rounding of the network's batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmscale.diffusion import process
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.diffusion.sample_latents import SamplerOptions, draw_latents, starting_noise
from ldmscale.distributed.collectives import gather_lists, sum_tensor_over_ranks
from ldmscale.evaluation.metrics import frechet_distance_of_features
from ldmscale.models.conditions import Conditions
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.evaluation_mode import evaluation_mode
from ldmscale.stages.first_stage import FirstStage, batch_conditions
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
                losses = process.loss_per_sample(output, noisy.target, "l2").tolist()
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


@dataclass(frozen=True)
class FeatureNetwork:
    """Describes images by vectors: `of` takes float [B,3,H,W] in [-1,1] and gives [B,width]."""

    distance: str  # what a Frechet distance of them is called
    width: int
    of: Callable[[Tensor], Tensor]


class GenerationFigures:
    """The held-out samples of this rank, and the features of all of them on every rank. Made by all ranks together."""

    def __init__(
        self,
        batches: Sequence[Batch],
        samples: int,
        network: FeatureNetwork,
        sampler: SamplerOptions,
        first_seed: int,
        first_stage: FirstStage,
    ) -> None:
        """`batches`: as many on every rank; their positions are the samples' numbers, from `samples` on padding."""
        self.batches, self.samples, self.network = batches, samples, network
        self.sampler, self.first_seed, self.first_stage = sampler, first_seed, first_stage
        self._shapes: list[torch.Size] = []  # of each batch's latents
        self._real = self._features(self._encoded())

    @torch.no_grad()
    def measure(self, denoiser: Denoiser, schedule: NoiseSchedule, dtype: torch.dtype) -> dict[str, float]:
        """The metrics by the weights that the denoiser has now, the same on all ranks. Collective.

        Each image is generated in the shape of its held-out sample.
        """
        told = [
            batch_conditions(batch, self.first_stage).to(self.first_stage.device) for batch in self.batches
        ]
        with evaluation_mode(denoiser):
            drawn = self._features(
                self._draw(denoiser, batch, conditions, schedule, shape, dtype)
                for batch, conditions, shape in zip(self.batches, told, self._shapes, strict=True)
            )
        found = {self.network.distance: frechet_distance_of_features(self._real, drawn)}
        if any(part is not None for part in told[0]):
            nearest = torch.cdist(drawn, self._real).argmin(dim=1)  # [N]
            own = nearest == torch.arange(self.samples, device=nearest.device)
            found["own_nearest_share"] = float(own.double().mean())
        return found

    def _encoded(self) -> Iterator[Tensor]:
        for batch in self.batches:
            latents = self.first_stage.batch_latents(batch, SEED)  # [B,C,h,w]
            self._shapes.append(latents.shape[1:])
            yield latents

    def _draw(
        self,
        denoiser: Denoiser,
        batch: Batch,
        conditions: Conditions,
        schedule: NoiseSchedule,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        seeds = [self.first_seed + number for number in batch["position"].tolist()]
        noise = starting_noise(seeds, shape).to(self.first_stage.device)
        return draw_latents(denoiser, conditions, noise, schedule, self.sampler, dtype, seeds)

    def _features(self, latents: Iterator[Tensor]) -> Tensor:
        """Of the decoded latents of all ranks' batches, in the order of the samples, float64 [N,width]."""
        device = self.first_stage.device
        rows = torch.zeros(self.samples, self.network.width, dtype=torch.float64, device=device)
        for batch, scaled in zip(self.batches, latents, strict=True):
            numbers = batch["position"].to(device)
            counts = numbers < self.samples
            images = self.first_stage.images(scaled).clamp(-1, 1)
            rows[numbers[counts]] = self.network.of(images)[counts].double()
        return sum_tensor_over_ranks(rows)

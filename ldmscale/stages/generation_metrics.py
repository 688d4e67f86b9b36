"""What drawn images are worth while training: one for each held-out sample, drawn as it is told, by all ranks together.

Two figures of a named network's features. The Frechet distance between the drawn images and the held-out ones says how
near the two sets are. The share of drawn images whose nearest held-out image is their own sample's says whether the
condition reaches the picture; chance is one over the number of samples. The held-out images are seen as the autoencoder
decodes them, so that its errors do not count. Features come together in the order of the samples, so the sharing out over
ranks shows in nothing but the rounding of the network's batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmscale.diffusion.sample_latents import SamplerOptions, draw_latents, starting_noise
from ldmscale.diffusion.schedule import NoiseSchedule
from ldmscale.distributed.collectives import sum_tensor_over_ranks
from ldmscale.evaluation.frechet import frechet_distance_of_features
from ldmscale.models.conditions import Conditions
from ldmscale.models.denoiser import Denoiser
from ldmscale.models.evaluation_mode import evaluation_mode
from ldmscale.stages.conditions import batch_conditions
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.validation import SEED
from ldmscale.train.stage import Batch


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
        self._real = self._features(first_stage.batch_latents(batch, SEED) for batch in batches)

    @torch.no_grad()
    def measure(
        self, denoiser: Denoiser, schedule: NoiseSchedule, latent_shape: Sequence[int], dtype: torch.dtype
    ) -> dict[str, float]:
        """The figures by the weights that the denoiser has now, the same on all ranks. Collective."""
        told = [
            batch_conditions(batch, self.first_stage).to(self.first_stage.device) for batch in self.batches
        ]
        with evaluation_mode(denoiser):
            drawn = self._features(
                self._draw(denoiser, batch, conditions, schedule, latent_shape, dtype)
                for batch, conditions in zip(self.batches, told, strict=True)
            )
        found = {self.network.distance: frechet_distance_of_features(self._real, drawn)}
        if any(part is not None for part in told[0]):
            nearest = torch.cdist(drawn, self._real).argmin(dim=1)  # [N]
            own = nearest == torch.arange(self.samples, device=nearest.device)
            found["own_nearest_share"] = float(own.double().mean())
        return found

    def _draw(
        self,
        denoiser: Denoiser,
        batch: Batch,
        conditions: Conditions,
        schedule: NoiseSchedule,
        latent_shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        seeds = [self.first_seed + number for number in batch["position"].tolist()]
        noise = starting_noise(seeds, latent_shape).to(self.first_stage.device)
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

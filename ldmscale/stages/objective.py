"""The denoising objective of one batch: noisy latents and targets, and the weighted loss with its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldmscale.data.loading.draws import Draws
from ldmscale.diffusion import process
from ldmscale.diffusion.process import NoiseSchedule
from ldmscale.tracking.metrics import Metric, PartialMean


class ObjectiveOptions(Protocol):
    """What the network learns to predict and how its error is weighted: the `diffusion` section of the configuration."""

    @property
    def prediction(self) -> str: ...
    @property
    def loss(self) -> str: ...
    @property
    def caption_dropout(self) -> float: ...
    @property
    def spatial_dropout(self) -> float: ...
    @property
    def weighting(self) -> str: ...
    @property
    def min_snr_gamma(self) -> float: ...
    @property
    def offset_noise(self) -> float: ...
    @property
    def input_perturbation(self) -> float: ...
    @property
    def loss_bins(self) -> int: ...


@dataclass(frozen=True)
class Objective:
    """An objective where no section of a configuration gives it, as in validation."""

    prediction: str  # "eps", "v" or "x0"
    loss: str  # "l2" or "l1"
    caption_dropout: float  # share of captions replaced by the null condition
    weighting: str = "none"  # or "min_snr"
    min_snr_gamma: float = 5.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    loss_bins: int = 4
    spatial_dropout: float = 0.0  # share of spatial conditions replaced by zeros


@dataclass(frozen=True)
class NoisyBatch:
    """Noisy latents and the target of the prediction."""

    x_t: Tensor  # float32 [B,C,h,w]
    target: Tensor  # float32 [B,C,h,w]
    t: Tensor  # int64 [B] on the device of the latents
    t_cpu: Tensor  # the same on the host: indexing by them does not make the host wait for a GPU


def add_noise(
    objective: ObjectiveOptions,
    schedule: NoiseSchedule,
    x0: Tensor,
    positions: Sequence[int],
    seed: int,
    timesteps: Tensor | None = None,
    drawn: Draws | None = None,
) -> NoisyBatch:
    """Noise for latents x0 [B,C,h,w]: each draw is a function of (seed, position, purpose). `drawn` may hold them.

    Timesteps are drawn uniformly unless `timesteps`, int64 [B] on the host, gives them (validation does).
    """
    drawn = drawn or Draws(seed, positions)
    shape = x0.shape[1:]

    def normal(purpose: str, shape: Sequence[int]) -> Tensor:
        return drawn.normal(purpose, shape).to(x0.device, non_blocking=True)

    noise = normal("noise", shape)
    if objective.offset_noise > 0:
        noise = noise + objective.offset_noise * normal("offset", (shape[0], 1, 1))
    seen = noise
    if objective.input_perturbation > 0:
        seen = noise + objective.input_perturbation * normal("perturbation", shape)
    if timesteps is None:
        uniform = drawn.uniform("timestep")
        timesteps = process.uniform_timesteps(uniform, schedule.timesteps)
        # Computed on both sides: the numbers that were drawn lie in page-locked memory, and what is made of them does not.
        t = process.uniform_timesteps(uniform.to(x0.device, non_blocking=True), schedule.timesteps)
    else:
        t = timesteps.to(x0.device, non_blocking=True)
    x_t = process.add_noise(schedule, x0, seen, t)
    return NoisyBatch(x_t, process.target(schedule, objective.prediction, x0, noise, t), t, timesteps)


def denoising_loss(
    objective: ObjectiveOptions, schedule: NoiseSchedule, noisy: NoisyBatch, output: Tensor
) -> tuple[Tensor, dict[str, Metric]]:
    """The weighted mean loss of a batch, and further metrics.

    "loss/bin_k" is the unweighted mean of the samples whose timestep lies in the k-th of `loss_bins` equal ranges; a
    range without samples has no entry, and the others count as many samples as they have, so their means over micro-batches
    and ranks do not depend on how a batch was split. "loss/unweighted" is added where a weighting is used.
    """
    losses = process.loss_per_sample(output, noisy.target, objective.loss)  # [B]
    unweighted = losses.detach()
    measured: dict[str, Metric] = {}
    if objective.weighting == "min_snr":
        weight = process.min_snr_weight(schedule, objective.prediction, noisy.t, objective.min_snr_gamma)
        losses = losses * weight
        measured["loss/unweighted"] = unweighted.mean()
    # Sorted on the device, counted on the host: neither waits for the other.
    sorted_losses = unweighted[
        torch.argsort(noisy.t * objective.loss_bins // schedule.timesteps, stable=True)
    ]
    counts = torch.bincount(noisy.t_cpu * objective.loss_bins // schedule.timesteps).tolist()
    for k, losses_of_bin in enumerate(torch.split(sorted_losses, counts)):
        if len(losses_of_bin):
            measured[f"loss/bin_{k + 1}"] = PartialMean(losses_of_bin.mean(), len(losses_of_bin))
    return losses.mean(), measured

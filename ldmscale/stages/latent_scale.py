"""The scale of latents: what the diffusion model sees has mean 0 and variance 1 (paper, section G).

Measured over all ranks from the moments of the posterior, by the law of total variance, so that it needs no draws:
Var[z] = E[mean^2 + exp(logvar)] - E[mean]^2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmscale.distributed.collectives import sum_over_ranks, sums_over_ranks


class ScaleMeter:
    """Sums over the latents that this rank sees; `measured` adds up all ranks."""

    def __init__(self, channels: int) -> None:
        self.count = 0  # latent positions
        self.sums = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, mean: Tensor, logvar: Tensor | None) -> None:
        """Posterior means [B,C,H,W] and log-variances of the same shape (None: a point, as VQ gives)."""
        mean = mean.detach().double().cpu()
        second = mean.square() if logvar is None else mean.square() + logvar.detach().double().cpu().exp()
        self.count += mean.numel() // mean.shape[1]
        self.sums += mean.sum((0, 2, 3))
        self.squares += second.sum((0, 2, 3))

    def measured(self) -> dict[str, Any]:
        """Mean and std of each channel, the single factor 1/std of all values, and the count. Collective."""
        count = sum_over_ranks(self.count)
        mean = torch.tensor(sums_over_ranks(self.sums.tolist()), dtype=torch.float64) / count
        second = torch.tensor(sums_over_ranks(self.squares.tolist()), dtype=torch.float64) / count
        std = (second - mean.square()).clamp(min=0).sqrt()
        overall = (second.mean() - mean.mean().square()).sqrt()
        return {
            "channel_mean": mean.tolist(),
            "channel_std": std.tolist(),
            "factor": 1 / float(overall),
            "positions": int(count),
        }

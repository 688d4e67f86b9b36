"""Samplers as functions of a denoiser and a starting noise (Song et al. 2021 for DDIM)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldmscale.diffusion.guidance import Denoise
from ldmscale.diffusion.process import split
from ldmscale.diffusion.schedule import NoiseSchedule


def ddim_timesteps(timesteps: int, steps: int) -> list[int]:
    """CompVis' uniform choice, from noise to image: every (timesteps // steps)-th, offset by one; exactly `steps` of them.

    Where `steps` does not divide `timesteps`, CompVis visits a few more; here the first `steps` multiples are visited.
    Raises ValueError unless 1 <= steps < timesteps.
    """
    if not 1 <= steps < timesteps:
        raise ValueError(f"{steps} sampler steps: expected 1 to {timesteps - 1}")
    stride = timesteps // steps
    return (
        [i * stride + 1 for i in reversed(range(steps))]
        if stride > 1
        else list(reversed(range(1, steps + 1)))
    )


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    fresh_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Follow DDIM (Song et al. 2021, eq. 12) from noise x [B,C,H,W] to a latent of the same shape.

    `fresh_noise(i)` gives the noise of step i where eta > 0 (eta 1 is DDPM's variance). The last step ends at
    alpha_bar_0, as CompVis does, not at 1.
    """
    if eta > 0 and fresh_noise is None:
        raise ValueError("eta > 0 draws noise in each step: give fresh_noise")
    visited = ddim_timesteps(schedule.timesteps, steps)
    for i, now in enumerate(visited):
        t = torch.full((len(x),), now, dtype=torch.int64, device=x.device)
        x0, noise = split(schedule, prediction, denoise(x, t).float(), x, t)
        bar = float(schedule.alphas_bar[now])
        bar_next = float(schedule.alphas_bar[visited[i + 1] if i + 1 < len(visited) else 0])
        sigma = eta * ((1 - bar_next) / (1 - bar) * (1 - bar / bar_next)) ** 0.5
        x = bar_next**0.5 * x0 + (1 - bar_next - sigma**2) ** 0.5 * noise
        if eta > 0 and fresh_noise is not None:
            x = x + sigma * fresh_noise(i)
    return x

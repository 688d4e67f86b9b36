"""Samplers of one network call a step, as functions of a denoiser, a starting noise and a path of noise levels.

All work on x_t = sqrt(bar) x0 + sqrt(1 - bar) noise, in float32, and take whatever the network predicts. The multistep ones
are in `multistep`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldmscale.diffusion.guidance import Denoise
from ldmscale.diffusion.process import split_at
from ldmscale.diffusion.timesteps import Path

FreshNoise = Callable[[int], Tensor]  # step -> noise like x
# (x, alpha_bar) -> x, after each step: inpainting puts the known part back, at the noise level just reached
Keep = Callable[[Tensor, float], Tensor]


def as_it_is(x: Tensor, bar: float) -> Tensor:
    """A `Keep` that keeps nothing."""
    return x


def predicted(denoise: Denoise, x: Tensor, path: Path, step: int, prediction: str) -> tuple[Tensor, Tensor]:
    """The (x0, noise) that the network believes at a step of the path, each float32 [B,C,H,W].

    Raises ValueError where the noise is predicted and no signal is left.
    """
    bar = path.bars[step]
    if bar == 0 and prediction == "eps":
        raise ValueError(
            "no signal is left at the first timestep: the noise says nothing about the image there"
        )
    output = denoise(x, path.t(step, x)).float()
    return split_at(prediction, output, x, bar**0.5, (1 - bar) ** 0.5)


def ddim(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    fresh_noise: FreshNoise | None = None,
    keep: Keep = as_it_is,
) -> Tensor:
    """Follow DDIM (Song et al. 2021, eq. 12) from noise x [B,C,H,W] to a latent of the same shape.

    `fresh_noise(step)` is the noise of a step where eta > 0; eta 1 has DDPM's variance. Raises ValueError without it.
    """
    if eta > 0 and fresh_noise is None:
        raise ValueError("eta > 0 draws noise in each step: give fresh_noise")
    for step in range(len(path)):
        bar, following = path.bars[step], path.bars[step + 1]
        x0, noise = predicted(denoise, x, path, step, prediction)
        sigma = eta * ((1 - following) / (1 - bar) * (1 - bar / following)) ** 0.5
        x = following**0.5 * x0 + max(1 - following - sigma**2, 0.0) ** 0.5 * noise
        if sigma > 0 and fresh_noise is not None:
            x = x + sigma * fresh_noise(step)
        x = keep(x, following)
    return x


def ddpm(
    denoise: Denoise,
    x: Tensor,
    path: Path,
    *,
    prediction: str = "eps",
    fresh_noise: FreshNoise,
    keep: Keep = as_it_is,
) -> Tensor:
    """Ancestral sampling: mean and variance of q(x_s | x_t, x0) (Ho et al. 2020, eqs. 6 and 7) at the path's levels.

    Fewer steps than timesteps follow the chain of the visited ones (Nichol and Dhariwal 2021, section 4).
    """
    for step in range(len(path)):
        bar, following = path.bars[step], path.bars[step + 1]
        x0, _ = predicted(denoise, x, path, step, prediction)
        alpha = bar / following
        x = (following**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - following) * x) / (1 - bar)
        variance = (1 - following) / (1 - bar) * (1 - alpha)
        if variance > 0:
            x = x + variance**0.5 * fresh_noise(step)
        x = keep(x, following)
    return x


def euler(
    denoise: Denoise, x: Tensor, path: Path, *, prediction: str = "eps", keep: Keep = as_it_is
) -> Tensor:
    """Euler's method on the probability flow in sigma = sqrt((1 - bar) / bar) (Karras et al. 2022, algorithm 1).

    With y = x / sqrt(bar) the slope (y - x0) / sigma is the predicted noise, so that a step is
    y + (sigma' - sigma) noise = x0 + sigma' noise, which also holds where sigma is infinite. In x it is DDIM's step of
    eta 0: the two differ by the levels that they visit.
    """
    for step in range(len(path)):
        following = path.bars[step + 1]
        x0, noise = predicted(denoise, x, path, step, prediction)
        sigma = ((1 - following) / following) ** 0.5
        x = keep(following**0.5 * (x0 + sigma * noise), following)
    return x

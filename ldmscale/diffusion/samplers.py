"""Samplers of one network call per step, as functions of a denoiser, a starting noise and a path of noise levels.

All work on x_t = sqrt(bar) x0 + sqrt(1 - bar) noise, in float32, and take whatever the network predicts. PLMS and
DPM-Solver++ of second order also use earlier predictions of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ldmscale.diffusion.guidance import Denoise
from ldmscale.diffusion.process import split_at
from ldmscale.diffusion.timesteps import Path

# Adams-Bashforth: weights of the newest noise prediction and those before it, by how many there are.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


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


def plms(
    denoise: Denoise, x: Tensor, path: Path, *, prediction: str = "eps", keep: Keep = as_it_is
) -> Tensor:
    """Pseudo linear multistep (Liu et al. 2022, eqs. 9 and 12, begun by an improved Euler step as CompVis does).

    It combines predictions of the noise, to which x0 and v are turned first. One network call a step, the first has two.
    Raises ValueError where the path begins without signal.
    """
    if path.bars[0] == 0:
        raise ValueError("plms works on the noise alone, which says nothing where no signal is left")
    answers: list[Tensor] = []  # predicted noise, newest first, at most four
    for step in range(len(path)):
        _, noise = predicted(denoise, x, path, step, prediction)
        answers = [noise, *answers[:3]]
        weights = _ADAMS_BASHFORTH[len(answers) - 1]
        combined = weights[0] * noise
        for weight, answer in zip(weights[1:], answers[1:], strict=True):
            combined = combined + weight * answer
        if step == 0:
            ahead = min(1, len(path) - 1)
            there = _along(x, noise, path.bars[0], path.bars[1])
            _, noise_there = predicted(denoise, there, path, ahead, prediction)
            combined = (noise + noise_there) / 2
        x = keep(_along(x, combined, path.bars[step], path.bars[step + 1]), path.bars[step + 1])
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, path: Path, *, prediction: str = "eps", keep: Keep = as_it_is
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): exact in x's linear part, second order in the predicted x0.

    The first step is of first order, and so is one that ends at a clean image, where log-SNR is infinite.
    """
    before: Tensor | None = None
    for step in range(len(path)):
        bar, following = path.bars[step], path.bars[step + 1]
        x0, _ = predicted(denoise, x, path, step, prediction)
        estimate = x0
        if before is not None and following < 1:
            ratio = (_log_snr(bar) - _log_snr(path.bars[step - 1])) / (_log_snr(following) - _log_snr(bar))
            estimate = x0 + (x0 - before) / (2 * ratio)  # an infinite ratio, after no signal, adds nothing
        shrink = ((1 - following) / (1 - bar)) ** 0.5  # sigma' / sigma
        # alpha' (1 - exp(-h)) with exp(h) = alpha' sigma / (alpha sigma'), written so that sigma' and alpha may be 0
        x = keep(shrink * x + (following**0.5 - shrink * bar**0.5) * estimate, following)
        before = x0
    return x


def _along(x: Tensor, noise: Tensor, bar: float, following: float) -> Tensor:
    """From level bar to `following` along a direction of noise (Liu et al. 2022, eq. 9, which is DDIM's step)."""
    along_noise: float = (1 - following) ** 0.5 - ((1 - bar) * following / bar) ** 0.5
    moved: Tensor = (following / bar) ** 0.5 * x + along_noise * noise
    return moved


def _log_snr(bar: float) -> float:
    """lambda = log(alpha / sigma); -inf without signal."""
    return -math.inf if bar == 0 else 0.5 * math.log(bar / (1 - bar))

"""Samplers that remember earlier answers of the network: PLMS, and DPM-Solver++ of second order."""

from __future__ import annotations

import math

from torch import Tensor

from ldmscale.diffusion.guidance import Denoise
from ldmscale.diffusion.samplers import Keep, as_it_is, predicted
from ldmscale.diffusion.timesteps import Path

# Adams-Bashforth: weights of the newest noise prediction and those before it, by how many there are.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


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

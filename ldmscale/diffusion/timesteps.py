"""Which noise levels a sampler visits: the ways of spacing timesteps (Lin et al. 2023, table 2), and where they end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldmscale.diffusion.process import NoiseSchedule

SPACINGS = ("leading", "trailing", "linspace")
SAMPLERS = ("ddpm", "ddim", "plms", "dpmpp_2m", "euler")


@dataclass(frozen=True)
class Path:
    """The noise levels of one sampling, from noise to image.

    `timesteps` [S] is what the network is told; a number between two timesteps stands for the noise level between them.
    `bars` [S+1] are the alpha_bar of each, and at last that where the last step ends: 1 is a clean image.
    `start` is what the first noise, of variance 1, is multiplied by.
    """

    timesteps: tuple[float, ...]
    bars: tuple[float, ...]
    start: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, steps: int) -> Path:
        """The end of the path, of `steps` steps: what image-to-image follows."""
        return Path(self.timesteps[len(self) - steps :], self.bars[len(self) - steps :], self.start)

    def t(self, step: int, x: Tensor) -> Tensor:
        """The timestep of `step` for each sample of x: int64 [B], or float32 [B] where it lies between two."""
        now = self.timesteps[step]
        whole = float(now).is_integer()
        return torch.full(
            (len(x),),
            int(now) if whole else now,
            dtype=torch.int64 if whole else torch.float32,
            device=x.device,
        )


def path_of(sampler: str, schedule: NoiseSchedule, steps: int, spacing: str | None = None) -> Path:
    """The path of `steps` steps that `sampler` follows.

    Args:
        sampler: one of SAMPLERS.
        spacing: one of SPACINGS; None is the published one of the sampler: "leading" for ddpm, ddim and plms,
            "linspace" for dpmpp_2m and euler, and "trailing" for all where the last timestep has no signal.

    "leading" visits every (T // steps)-th timestep: for ddim and plms from 1 on, with the end at alpha_bar_0, as CompVis
    does (range(0, T, T // S) + 1, the first `steps` of them where `steps` does not divide T); for ddpm from 0 on, so that
    T steps are the whole chain. "trailing" begins at the last timestep, "linspace" too, and both end at a clean image.

    Raises:
        ValueError: there is no such sampler or spacing, `steps` is not within 1 to T - 1 (ddpm: T), or the schedule has
            no terminal signal and the sampler or spacing cannot begin there.
    """
    total = schedule.timesteps
    most = total if sampler == "ddpm" else total - 1
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} sampler steps: expected 1 to {most}")
    if not schedule.has_terminal_signal and (sampler == "plms" or spacing == "leading"):
        what = "plms works on the noise alone" if sampler == "plms" else "leading spacing begins before it"
        raise ValueError(f"the schedule has no signal at its last timestep, and {what}")
    if spacing is None:
        published = "linspace" if sampler in ("dpmpp_2m", "euler") else "leading"
        spacing = published if schedule.has_terminal_signal else "trailing"
    if spacing == "leading":
        offset = 0 if sampler == "ddpm" else 1
        visited = [float(i * (total // steps) + offset) for i in reversed(range(steps))]
    elif spacing == "trailing":
        visited = [float(round(total - i * total / steps) - 1) for i in range(steps)]
    elif spacing == "linspace":
        visited = _linspace(sampler, total, steps)
    else:
        raise ValueError(f"spacing {spacing!r}: expected one of {', '.join(SPACINGS)}")
    as_compvis = spacing == "leading" and sampler in ("ddim", "plms")
    end = float(schedule.alphas_bar[0]) if as_compvis else 1.0
    bars = (*(_bar(schedule, t) for t in visited), end)
    # Euler's noise is as large as the first level's (sigma there is all of it); diffusers makes leading an exception.
    start = (1 - bars[0]) ** 0.5 if sampler == "euler" and spacing != "leading" else 1.0
    return Path(tuple(visited), bars, start)


def _linspace(sampler: str, total: int, steps: int) -> list[float]:
    if sampler == "euler":  # ends at timestep 0 and tells the network what lies between two timesteps
        return [float(t) for t in np.linspace(0, total - 1, steps)[::-1]] if steps > 1 else [total - 1.0]
    return [float(t) for t in np.linspace(0, total - 1, steps + 1).round()[:0:-1]]


def _bar(schedule: NoiseSchedule, t: float) -> float:
    """alpha_bar at t; between two timesteps sqrt((1 - bar) / bar), the noise over the signal, is interpolated."""
    below = int(t)
    if t == below:
        return float(schedule.alphas_bar[below])
    ratios = [((1 - bar) / bar) ** 0.5 for bar in schedule.alphas_bar[below : below + 2].tolist() if bar > 0]
    if len(ratios) < 2:
        raise ValueError("euler with linspace spacing meets a timestep without signal: take trailing")
    ratio = ratios[0] + (t - below) * (ratios[1] - ratios[0])
    return float(1 / (1 + ratio**2))

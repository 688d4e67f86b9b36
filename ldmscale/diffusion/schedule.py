"""Noise schedules: how much signal is left at each timestep (Ho et al. 2020, section 2; Nichol and Dhariwal 2021, eq. 17)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """`alphas_bar[t]` is the share of the signal's variance that is left at timestep t, float64 [T] on the CPU."""

    alphas_bar: Tensor

    @classmethod
    def make(
        cls,
        kind: str,
        timesteps: int,
        beta_start: float,
        beta_end: float,
        zero_terminal_snr: bool = False,
    ) -> NoiseSchedule:
        """Build `kind`: "linear" (in beta), "scaled_linear" (in sqrt(beta), which CompVis calls linear) or "cosine".

        The cosine schedule has no use for the betas. `zero_terminal_snr` takes the last of the signal away from the last
        timestep. Raises ValueError for another kind.
        """
        if kind == "linear":
            betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2
        elif kind == "cosine":
            time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"schedule {kind!r}: expected linear, scaled_linear or cosine")
        alphas_bar = torch.cumprod(1 - betas, dim=0)
        return cls(without_terminal_signal(alphas_bar) if zero_terminal_snr else alphas_bar)

    @property
    def timesteps(self) -> int:
        return len(self.alphas_bar)

    @property
    def has_terminal_signal(self) -> bool:
        """Whether anything of the image is left at the last timestep; where not, a sampler must begin there."""
        return float(self.alphas_bar[-1]) > 0

    def signal(self, t: Tensor) -> Tensor:
        """sqrt(alpha_bar_t), float32 [B,1,1,1] on t's device, for t int64 [B]."""
        return self._bar(t).sqrt().float()[:, None, None, None]

    def noise(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha_bar_t), float32 [B,1,1,1] on t's device, for t int64 [B]."""
        return (1 - self._bar(t)).sqrt().float()[:, None, None, None]

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), float64 [B] on t's device, for t int64 [B]."""
        bar = self._bar(t)
        return bar / (1 - bar)

    def _bar(self, t: Tensor) -> Tensor:
        # The table goes to t's device: asking t back from a GPU would make the host wait for it.
        return self.alphas_bar.to(t.device, non_blocking=True)[t]


def without_terminal_signal(alphas_bar: Tensor) -> Tensor:
    """Shift and stretch sqrt(alpha_bar) so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1): [T]."""
    signal = alphas_bar.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))).square()

"""The noise schedule, the forward process, what the network predicts, and the loss of one sample.

Schedules: Ho et al. 2020, section 2; Nichol and Dhariwal 2021, eq. 17. Process: Ho et al. 2020; Salimans and Ho 2022.
Everywhere x0 and noise are [B,C,H,W] and t is int64 [B]; v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """`alphas_bar[t]` is the share of the signal's variance that is left at timestep t, float64 [T] on the CPU."""

    alphas_bar: Tensor
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

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
        # The table goes to t's device, once: asking t back from a GPU would make the host wait for it.
        return self.on(t.device)[t]

    def on(self, device: torch.device) -> Tensor:
        """`alphas_bar` on `device`; copied when it is asked for first."""
        table = self._copies.get(device)
        if table is None:
            table = self._copies[device] = self.alphas_bar.to(device)
        return table


def without_terminal_signal(alphas_bar: Tensor) -> Tensor:
    """Shift and stretch sqrt(alpha_bar) so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1): [T]."""
    signal = alphas_bar.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))).square()


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of Ho et al. 2020, eq. 4: [B,C,H,W]."""
    return schedule.signal(t) * x0 + schedule.noise(t) * noise


def target(schedule: NoiseSchedule, prediction: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network should answer: [B,C,H,W]. `prediction` is "eps", "v" or "x0"."""
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return schedule.signal(t) * noise - schedule.noise(t) * x0
    raise ValueError(f"prediction {prediction!r}: expected eps, v or x0")


def split(
    schedule: NoiseSchedule, prediction: str, output: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """The (x0, noise) that a network's output means at x_t, each [B,C,H,W]."""
    return split_at(prediction, output, x_t, schedule.signal(t), schedule.noise(t))


def split_at(
    prediction: str, output: Tensor, x_t: Tensor, signal: Tensor | float, noise_level: Tensor | float
) -> tuple[Tensor, Tensor]:
    """As `split`, at given sqrt(alpha_bar) and sqrt(1 - alpha_bar)."""
    if prediction == "eps":
        return (x_t - noise_level * output) / signal, output
    if prediction == "x0":
        return output, (x_t - signal * output) / noise_level
    if prediction == "v":
        return signal * x_t - noise_level * output, noise_level * x_t + signal * output
    raise ValueError(f"prediction {prediction!r}: expected eps, v or x0")


def loss_per_sample(output: Tensor, wanted: Tensor, kind: str) -> Tensor:
    """Mean squared ("l2") or absolute ("l1") error of each sample: float32 [B]."""
    error = output.float() - wanted.float()
    if kind == "l2":
        return error.square().flatten(1).mean(1)
    if kind == "l1":
        return error.abs().flatten(1).mean(1)
    raise ValueError(f"loss {kind!r}: expected l2 or l1")


def min_snr_weight(schedule: NoiseSchedule, prediction: str, t: Tensor, gamma: float) -> Tensor:
    """Weight of each sample's squared error under Min-SNR-gamma (Hang et al. 2023, section 3.4): float32 [B].

    The weight of the error of x0 is min(SNR, gamma). An error of the noise is worth SNR times less, and one of v
    SNR + 1 times less, for |x0 error|^2 = |noise error|^2 / SNR = |v error|^2 / (SNR + 1).
    At a timestep without signal (SNR 0) the weight of x0 and v is 0.
    """
    snr = schedule.snr(t)
    capped = snr.clamp(max=gamma)
    if prediction == "eps":
        return (capped / snr).float()
    if prediction == "v":
        return (capped / (snr + 1)).float()
    if prediction == "x0":
        return capped.float()
    raise ValueError(f"prediction {prediction!r}: expected eps, v or x0")


def uniform_timesteps(uniform: Tensor, timesteps: int) -> Tensor:
    """int64 [B] in 0..timesteps-1 from float64 numbers in [0,1)."""
    return (uniform * timesteps).long().clamp(max=timesteps - 1)


def drop_mask(uniform: Tensor, rate: float) -> Tensor:
    """bool [B]: which samples lose their condition, from numbers in [0,1)."""
    return uniform < rate


def spatial_drop_mask(uniform: Tensor, context_rate: float, rate: float) -> Tensor:
    """bool [B]: which samples lose what is joined to the latent, from the numbers that `drop_mask` sees.

    The first half of those that lose their context keep it, the others lose both: with equal rates a third each of the dropped
    loses the one, the other and both (Brooks et al. 2023, section 3.2.1: 5% each), as guidance on both asks.
    """
    first = context_rate / 2
    return (uniform >= first) & (uniform < first + rate)

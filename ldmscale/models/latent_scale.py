"""The scale of latents (paper, Appendix G) and the digest of the weights that make them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LatentScale:
    """scaled = (latent - shift) * factor, each float32 [C]; the paper's single factor has shift 0 and equal entries."""

    shift: Tensor
    factor: Tensor

    @classmethod
    def of(cls, statistics: Mapping[str, Any], kind: str, fixed_factor: float | None = None) -> LatentScale:
        """From measured statistics: kind "factor" (one number, no shift) or "channel" (mean and std of each channel)."""
        mean, std = torch.tensor(statistics["channel_mean"]), torch.tensor(statistics["channel_std"])
        if fixed_factor is not None:
            return cls(torch.zeros_like(mean), torch.full_like(mean, fixed_factor))
        if kind == "channel":
            return cls(mean, 1 / std)
        return cls(torch.zeros_like(mean), torch.full_like(mean, float(statistics["factor"])))

    def scale(self, latent: Tensor) -> Tensor:
        """[B,C,H,W] as the autoencoder makes it -> as the diffusion model sees it."""
        return (latent - self._wide(self.shift, latent)) * self._wide(self.factor, latent)

    def unscale(self, latent: Tensor) -> Tensor:
        """[B,C,H,W] as the diffusion model makes it -> as the decoder takes it."""
        return latent / self._wide(self.factor, latent) + self._wide(self.shift, latent)

    @staticmethod
    def _wide(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like.device, torch.float32)[:, None, None]

    def plain(self) -> dict[str, list[float]]:
        return {"shift": self.shift.tolist(), "factor": self.factor.tolist()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> LatentScale:
        return cls(torch.tensor(values["shift"]), torch.tensor(values["factor"]))


def digest(autoencoder: nn.Module) -> str:
    """Identifies an autoencoder by its weights in float32: latents of one digest never meet a decoder of another."""
    found = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]

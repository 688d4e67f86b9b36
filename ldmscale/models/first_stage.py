"""The first stage of a diffusion model: the autoencoders that it may work behind, and the scale of their latents.

`PixelAutoencoder` is no first stage at all, the latent is the image: LDM-1 of the paper.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder


class Pixels(NamedTuple):
    """What takes the place of a bottleneck."""

    latent: Tensor
    """[B, C, H, W], the image itself."""

    def moments(self) -> Tensor:
        """[B, C, H, W], the image."""
        return self.latent


class PixelAutoencoder(nn.Module):
    """An autoencoder without weights, of factor 1, that gives back what it gets."""

    downsampling = 1

    def __init__(self, *, image_channels: int = 3) -> None:
        super().__init__()
        self.latent_channels = image_channels

    def encode(self, images: Tensor) -> Pixels:
        """[B, C, H, W] in [-1, 1] -> the same."""
        return Pixels(images)

    def decode(self, latent: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return latent

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Pixels]:
        """(the images, the images); `noise` is not read: all autoencoders are called alike."""
        return images, Pixels(images)


# What a diffusion model may work behind.
FirstStageNetwork = KLAutoencoder | VQAutoencoder | PixelAutoencoder


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

    def to(self, device: torch.device) -> LatentScale:
        """The same on `device`, so that no batch waits for a copy of it."""
        return LatentScale(self.shift.to(device, torch.float32), self.factor.to(device, torch.float32))

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

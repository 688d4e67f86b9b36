"""No first stage at all: the latent is the image. LDM-1 of the paper, the pixel model that the others are compared with."""

from __future__ import annotations

from typing import NamedTuple

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

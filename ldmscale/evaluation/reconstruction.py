"""How well an autoencoder reconstructs images that it was not trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder


@torch.no_grad()
def reconstruct(autoencoder: KLAutoencoder | VQAutoencoder, images: Tensor, batch: int = 64) -> Tensor:
    """float [N,3,H,W] in [-1,1] -> reconstructions (by the posterior's mean) of the same shape, clamped to [-1,1]."""
    return torch.cat([autoencoder(part, None)[0].clamp(-1, 1) for part in torch.split(images, batch)])


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float [N]; both [N,3,H,W] in [-1,1], rounded to 8 bits first.

    PSNR = 10 log10(255^2 / MSE), the usual definition for 8-bit images.
    """
    a, b = (((x.clamp(-1, 1) + 1) * 127.5).round() for x in (images, reconstructions))
    error = (a - b).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error.clamp(min=1e-10))

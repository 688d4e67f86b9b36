"""How well an autoencoder reconstructs images that it was not trained on: figures of each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.models.pixels import FirstStageNetwork

# Wang et al. 2004, section III.C
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


@torch.no_grad()
def reconstruct(autoencoder: FirstStageNetwork, images: Tensor, batch: int = 64) -> Tensor:
    """float [N,3,H,W] in [-1,1] -> reconstructions (by the posterior's mean) of the same shape, clamped to [-1,1]."""
    return torch.cat([autoencoder(part, None)[0].clamp(-1, 1) for part in torch.split(images, batch)])


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float [N]; both [N,3,H,W] in [-1,1], rounded to 8 bits first.

    PSNR = 10 log10(255^2 / MSE), the usual definition for 8-bit images.
    """
    a, b = _bytes(images), _bytes(reconstructions)
    error = (a - b).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error.clamp(min=1e-10))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each image, float64 [N]; both [N,3,H,W] in [-1,1], rounded to 8 bits first.

    Wang et al. 2004: Gaussian window of 11x11 with sigma 1.5, where it lies within the image; each colour by itself, and
    the mean over colours and places. Raises ValueError for images smaller than the window.
    """
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"images of {tuple(images.shape[2:])}: SSIM needs at least {SSIM_WINDOW} pixels a side"
        )
    a, b = _bytes(images).double(), _bytes(reconstructions).double()
    steps = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=a.device) - SSIM_WINDOW // 2
    line = torch.exp(-steps.square() / (2 * SSIM_SIGMA**2))
    line = line / line.sum()

    def blurred(x: Tensor) -> Tensor:
        planes = x.flatten(0, 1)[:, None]  # [N*3,1,H,W]
        return F.conv2d(F.conv2d(planes, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1)).view(
            *x.shape[:2], -1
        )

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    similar = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    similar = similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similar.mean((1, 2))


def _bytes(images: Tensor) -> Tensor:
    """[-1,1] -> whole numbers 0 to 255, as a saved picture has them."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()

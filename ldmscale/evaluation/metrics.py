"""Image metrics: reconstruction (PSNR, SSIM), Frechet distance between sets, and agreement of samples with prompts.

The Frechet distance (Heusel et al. 2017, eq. 6) compares Gaussians of a network's features. It is a FID only with the
features of the Inception network of that paper; with others it is named after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.distributed.collectives import sum_tensor_over_ranks
from ldmscale.models.first_stage import FirstStageNetwork

# Wang et al. 2004, section III.C
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


@torch.no_grad()
def reconstruct(autoencoder: FirstStageNetwork, images: Tensor, batch: int = 64) -> Tensor:
    """float [N,3,H,W] in [-1,1] -> reconstructions (by the posterior's mean) of the same shape, clamped to [-1,1]."""
    return torch.cat([autoencoder(part, None)[0].clamp(-1, 1) for part in torch.split(images, batch)])


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float [N]; both [N,3,H,W] in [-1,1], rounded to 8 bits first.

    PSNR = 10 log10(255^2 / MSE), the usual definition for 8-bit images: infinite for an exact reconstruction.
    """
    a, b = _bytes(images), _bytes(reconstructions)
    error = (a - b).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / error)


def mean_psnr(values: Sequence[float]) -> tuple[float, int]:
    """The mean over images that are not reconstructed exactly, and the number of the others, whose PSNR is infinite.

    The mean is infinite where there are no others, and not a number without images.
    """
    finite = [value for value in values if math.isfinite(value)]
    exact = len(values) - len(finite)
    if not finite:
        return (math.inf if exact else math.nan), exact
    return sum(finite) / len(finite), exact


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


class FeatureSums:
    """Mean and covariance of features, gathered batch by batch in float64 on the features' device."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """[B,width]."""
        wide = features.detach().double()
        self.count += len(wide)
        self.sums += wide.sum(0)
        self.products += wide.t() @ wide

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean [width] and covariance [width,width] (divided by count - 1) over all ranks, on the CPU. Collective.

        Raises ValueError for fewer than two samples.
        """
        count = float(sum_tensor_over_ranks(self.count))
        if count < 2:
            raise ValueError(f"{count:.0f} samples: a covariance needs two at least")
        mean = sum_tensor_over_ranks(self.sums).cpu() / count
        products = sum_tensor_over_ranks(self.products).cpu()
        return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two (mean, covariance), float64.

    tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2). Directions without variance, of which there are
    many with fewer samples than features, are left out of the roots: the root of their rounding would count.
    """
    (m1, c1), (m2, c2) = first, second
    cross = torch.linalg.svdvals(_root(c1) @ _root(c2)).sum()
    return float((m1 - m2).square().sum() + torch.trace(c1) + torch.trace(c2) - 2 * cross)


def frechet_distance_of_features(first: Tensor, second: Tensor) -> float:
    """The same from the features themselves, [N,width] and [M,width], in float64: far faster where they are few.

    With centred features A and B, C1 = A'A/(N-1) and C2 = B'B/(M-1), the singular values of C1^(1/2) C2^(1/2) are those
    of A B' / ((N-1)(M-1))^(1/2), a matrix of N x M.

    Raises ValueError for fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} samples: a covariance needs two at least")
    means = first.double().mean(0), second.double().mean(0)
    a = (first.double() - means[0]) / (len(first) - 1) ** 0.5
    b = (second.double() - means[1]) / (len(second) - 1) ** 0.5
    cross = torch.linalg.svdvals(a @ b.t()).sum()
    return float((means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.t()) / 2)
    least = values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = (vectors * torch.where(values > least, values, 0.0).sqrt()) @ vectors.t()
    return root


@dataclass(frozen=True)
class PromptFollowing:
    """Shares of samples in [0,1], each with the share that a random choice among the real images would reach."""

    samples: int
    class_share: float  # the nearest real image is of the prompt's class
    class_chance: float
    own_share: float  # the prompt's own image is among the `nearest` nearest ones
    own_chance: float
    first_share: float  # the prompt's own image is the nearest one
    nearest: int
    nearest_index: tuple[int, ...]  # of each sample, among the real images


def prompt_following(
    samples: Tensor, own: Sequence[int], real: Tensor, classes: Sequence[str], nearest: int = 5
) -> PromptFollowing:
    """Score samples against all real images by their distance in pixels, with the level that chance would reach.

    Real images are compared as the autoencoder reconstructs them, so that its errors do not count against the samples. A
    result at chance level means that the model ignores the prompt, however good its images look.

    Args:
        samples: float [N,3,H,W] in [-1,1].
        own: which real image each sample's prompt belongs to, [N].
        real: reconstructions of all real images, float [M,3,H,W].
        classes: of the real images, [M].
        nearest: how many nearest images count as found.

    Raises:
        ValueError: lengths that do not fit each other.
    """
    if len(own) != len(samples) or len(classes) != len(real) or not len(samples):
        raise ValueError(
            f"{len(samples)} samples, {len(own)} prompts, {len(real)} images, {len(classes)} classes"
        )
    distance = torch.cdist(samples.flatten(1).double(), real.flatten(1).double())  # [N,M]
    ranked = distance.argsort(dim=1)[:, :nearest]  # [N,nearest]
    first = ranked[:, 0].tolist()
    count = len(samples)
    return PromptFollowing(
        samples=count,
        class_share=sum(classes[n] == classes[o] for n, o in zip(first, own, strict=True)) / count,
        class_chance=sum(classes.count(classes[o]) / len(classes) for o in own) / count,
        own_share=sum(o in row for o, row in zip(own, ranked.tolist(), strict=True)) / count,
        own_chance=min(nearest, len(real)) / len(real),
        first_share=sum(o == n for o, n in zip(own, first, strict=True)) / count,
        nearest=nearest,
        nearest_index=tuple(first),
    )

"""The Frechet distance between two sets of images, as Gaussians of a network's features (Heusel et al. 2017, eq. 6).

It is a FID only with the features of the Inception network of that paper; with others it is named after them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmscale.distributed.collectives import sum_tensor_over_ranks


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

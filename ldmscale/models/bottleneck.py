"""What sits between encoder and decoder: a diagonal Gaussian (KL) or a table of vectors (VQ).

`Posterior` and `Codes` are named tuples on purpose: DeepSpeed looks for tensors in the tuples, lists and
dictionaries that a network returns and warns about every other type.

Both offer what the rest of the first stage needs without asking which one it is: `moments` (what a latent shard
stores), `spread` (mean and log-variance of a latent), `regulariser` (their term of the loss).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmscale.models.layers import at_least_fp32


class Posterior(NamedTuple):
    """q(z|x), a Gaussian with independent components. mean, logvar: [B, C, h, w]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """moments [B, 2C, h, w]: means, then log-variances, which are held within [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)  # [B, C, h, w] each
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def moments(self) -> Tensor:
        """[B, 2C, h, w], what `from_moments` takes."""
        return torch.cat([self.mean, self.logvar], dim=1)

    def spread(self) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the latent, [B, C, h, w] each."""
        return self.mean, self.logvar

    def regulariser(self) -> Tensor:
        """The divergence from the standard normal in nats, summed over a sample, averaged over the batch."""
        return self.kl().mean()

    def sample(self, noise: Tensor) -> Tensor:
        """mean + exp(logvar / 2) * noise; noise [B, C, h, w] standard normal, drawn by the caller."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise  # [B, C, h, w]

    def mode(self) -> Tensor:
        """[B, C, h, w]."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over a sample: [B], fp32 at least."""
        wide = at_least_fp32(self.mean.dtype)
        mean, logvar = self.mean.to(wide), self.logvar.to(wide)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))  # [B]


class Codes(NamedTuple):
    """Result of a vector quantiser."""

    latent: Tensor
    """[B, C, h, w] before quantisation: what the diffusion model of a VQ autoencoder learns."""
    quantized: Tensor
    """[B, C, h, w] nearest vectors; the gradient goes straight through to `latent`."""
    indices: Tensor
    """[B, h, w] int64 rows of the table."""
    loss: Tensor
    """Scalar: encoder towards vectors plus `commitment` times vectors towards encoder."""

    def moments(self) -> Tensor:
        """[B, C, h, w], the latent before quantisation."""
        return self.latent

    def spread(self) -> tuple[Tensor, Tensor | None]:
        """The latent [B, C, h, w]; a point has no log-variance."""
        return self.latent, None

    def regulariser(self) -> Tensor:
        """The codebook loss, averaged over all elements."""
        return self.loss


Bottleneck = Posterior | Codes


class VectorQuantizer(nn.Module):
    """Replaces each position of a map by the nearest of `size` learned vectors (van den Oord et al. 2017).

    The released models were trained with `commitment` (0.25) on the term that moves the *vectors*, and 1 on
    the one that moves the encoder; that order is kept: loss = |sg(q) - z|^2 + commitment * |q - sg(z)|^2.
    Vectors start uniform in +-1/size.
    """

    def __init__(self, size: int, channels: int, *, commitment: float = 0.25) -> None:
        super().__init__()
        self.commitment = commitment
        self.embedding = nn.Parameter(torch.empty(size, channels))
        nn.init.uniform_(self.embedding, -1.0 / size, 1.0 / size)

    def forward(self, latent: Tensor) -> Codes:
        """latent [B, C, h, w]."""
        wide = at_least_fp32(latent.dtype)
        z = latent.permute(0, 2, 3, 1)  # [B, h, w, C]
        table = self.embedding.to(wide)  # [size, C]
        flat = z.detach().reshape(-1, z.shape[-1]).to(wide)  # [B h w, C]
        # |z - e|^2 without |z|^2, which is the same for every e.
        distances = torch.addmm(
            table.detach().square().sum(1), flat, table.detach().t(), alpha=-2.0
        )  # [B h w, size]
        indices = distances.argmin(dim=1).view(z.shape[:-1])  # [B, h, w]
        vectors = F.embedding(indices, self.embedding)  # [B, h, w, C]
        loss = F.mse_loss(z.to(wide), vectors.detach().to(wide))
        loss = loss + self.commitment * F.mse_loss(vectors.to(wide), z.detach().to(wide))
        quantized = z + (vectors - z).detach()  # [B, h, w, C], gradient of z
        return Codes(latent, quantized.permute(0, 3, 1, 2).contiguous(), indices, loss)

    def vectors(self, indices: Tensor) -> Tensor:
        """Rows of the table: [B, h, w] -> [B, C, h, w]."""
        return F.embedding(indices, self.embedding).permute(0, 3, 1, 2).contiguous()

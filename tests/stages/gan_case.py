"""What the sharded stage and its plain reference share: networks, images and settings; no line of the stage itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmscale.models.autoencoder import KLAutoencoder, VQAutoencoder
from ldmscale.models.discriminator import PatchDiscriminator

STEPS, START, PASSES, PASS = 30, 8, 2, 6  # PASS images of all ranks together, PASSES times a step
SIZE, RATE, BETAS = 16, 4e-5, (0.5, 0.9)
# Some gradients are zero by symmetry (biases in front of a norm), so what is computed for them is rounding. Adam would
# turn that into whole steps; an eps above the rounding of each kind's gradients leaves the comparison to what is computed.
EPS = {"kl": 1e-3, "vq": 1e-6}
SCALED = 13  # images of the latent scale: neither ranks nor passes divide them
PERCEPTUAL, KL_WEIGHT, CODEBOOK_WEIGHT, GAN_WEIGHT, R1_WEIGHT, R1_EVERY = 0.7, 1e-3, 1.0, 0.6, 5.0, 2


@dataclass(frozen=True)
class Case:
    kind: str  # kl: sums, learned log-variance, hinge, R1; vq: means, vanilla
    norm: str  # of the discriminator

    @property
    def of_kl(self) -> bool:
        return self.kind == "kl"


def autoencoder(kind: str, checkpointing: str = "off") -> KLAutoencoder | VQAutoencoder:
    common = {
        "latent_channels": 4, "channels": 8, "channel_mult": (1, 2), "blocks_per_level": 1, "norm_groups": 4,
        "checkpointing": checkpointing,
    }  # fmt: skip
    if kind == "vq":
        return VQAutoencoder(codebook_size=24, codebook_dim=3, **common)  # type: ignore[arg-type]
    return KLAutoencoder(**common)  # type: ignore[arg-type]


def discriminator(norm: str) -> PatchDiscriminator:
    return PatchDiscriminator(channels=32, layers=1, norm=norm)  # type: ignore[arg-type]


def images(step: int, number: int) -> tuple[Tensor, list[int]]:
    """uint8 [PASS,3,SIZE,SIZE] of one pass, and positions."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    coarse = torch.rand(PASS, 3, 4, 4, generator=generator)
    fine = F.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    first = (step * PASSES + number) * PASS
    return (fine * 255).round().byte(), list(range(first, first + PASS))


def distance(a: Tensor, b: Tensor) -> Tensor:
    """A stand-in for a perceptual network: differences of blurred images, [B]."""
    return F.avg_pool2d(a - b, 4).square().mean((1, 2, 3))

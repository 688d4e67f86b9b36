"""Conditions that are joined to the latent, read or made for one sample: small images, masks, maps of classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldmscale.data.degradation import degrade
from ldmscale.data.masks import draw_mask
from ldmscale.distributed.seeds import generator


@dataclass(frozen=True)
class SmallImages:
    """Super-resolution: adds "spatial" float32 [3, H / factor, W / factor] in about [-1, 1], made of the image.

    Attributes:
        factor: of the first stage, so that the small image has the latent's size.
        degradation: one of `degradation.DEGRADATIONS`.
        noise: normal noise of a strength drawn from 0 to this is added, in units of [-1, 1] (noise augmentation,
            Ho et al. 2021, of which the network is not told the strength).
    """

    factor: int
    degradation: str = "bicubic"
    noise: float = 0.0

    def of(self, image: np.ndarray, seed: int, position: int) -> dict[str, np.ndarray]:
        """Of an image uint8 [3, H, W], a function of (seed, position) besides."""
        small = degrade(image, self.factor, self.degradation, generator(seed, position, "degradation"))
        spatial = small.astype(np.float32) / 127.5 - 1
        if self.noise:
            draws = generator(seed, position, "condition noise")
            strength = np.float32(draws.uniform(0, self.noise))
            spatial += strength * draws.standard_normal(spatial.shape, dtype=np.float32)
        return {"spatial": spatial}


@dataclass(frozen=True)
class Holes:
    """Inpainting: adds "mask" uint8 [1, H, W], 1 in the hole; the stage encodes the image without it.

    Attributes:
        strengths: of `masks.STRENGTHS`, each as likely.
    """

    strengths: tuple[str, ...] = ("thin", "medium", "thick")

    def of(self, image: np.ndarray, seed: int, position: int) -> dict[str, np.ndarray]:
        """For an image uint8 [3, H, W], a function of (seed, position) and its size."""
        _, height, width = image.shape
        return {"mask": draw_mask(height, width, self.strengths, generator(seed, position, "mask"))}

"""Conditions that are joined to the latent, read or made for one sample: small images, masks, maps of classes."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ldmscale.distributed.rng import generator


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


DEGRADATIONS = ("bicubic", "blind")

BLUR_SIGMA = (0.1, 0.6)  # pixels of the large image for each factor of reduction
NOISE_SIGMA = (0.0, 10.0)  # of 255
JPEG_QUALITY = (50, 95)
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)


def degrade(image: np.ndarray, factor: int, kind: str, generator: np.random.Generator) -> np.ndarray:
    """The small image of an image.

    Args:
        image: uint8 [3, H, W], sides multiples of `factor`.
        kind: one of DEGRADATIONS. Only "blind" draws from `generator`.

    Returns:
        uint8 [3, H / factor, W / factor].
    """
    large = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    size = (large.width // factor, large.height // factor)
    if kind == "bicubic":
        return _array(large.resize(size, Image.Resampling.BICUBIC))
    if kind != "blind":
        raise ValueError(f"degradation {kind!r}: expected one of {DEGRADATIONS}")
    # Every number is drawn whatever the others are, so that each is the same function of the generator.
    sigma = factor * generator.uniform(*BLUR_SIGMA)
    chosen = _FILTERS[int(generator.integers(len(_FILTERS)))]
    strength = generator.uniform(*NOISE_SIGMA)
    quality = int(generator.integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1))
    small = _array(large.filter(ImageFilter.GaussianBlur(sigma)).resize(size, chosen))
    noisy = small + strength * generator.standard_normal(small.shape)
    pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
    with Image.open(io.BytesIO(buffer.getvalue())) as stored:
        return _array(stored.convert("RGB"))


def _array(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


class Strength(NamedTuple):
    """How large the holes are; lengths in pixels of an image of 256."""

    chains: tuple[int, int]  # how many, both ends included
    width: tuple[float, float]  # of a stroke
    length: tuple[float, float]  # of one piece of a chain
    boxes: tuple[int, int]
    side: tuple[float, float]  # of a box


STRENGTHS = {
    "thin": Strength((2, 8), (4, 10), (20, 100), (1, 3), (10, 40)),
    "medium": Strength((2, 5), (10, 40), (20, 120), (1, 3), (30, 90)),
    "thick": Strength((1, 4), (30, 90), (30, 160), (1, 3), (60, 150)),
}
_PIECES = (3, 8)  # of a chain
_BOX_SHARE = 0.3  # of masks that are boxes; the others are strokes
MOST = 0.9  # of the image at most is a hole


def draw_mask(
    height: int, width: int, strengths: tuple[str, ...], generator: np.random.Generator
) -> np.ndarray:
    """A mask of one of `strengths`, each as likely.

    Returns:
        uint8 [1, height, width], 1 in the hole. Never empty, and at most MOST of the image.
    """
    strength = STRENGTHS[strengths[int(generator.integers(len(strengths)))]]
    while True:
        mask = _drawn(height, width, strength, generator)
        if 0 < mask.mean() <= MOST:
            return mask[None]


def _drawn(height: int, width: int, strength: Strength, generator: np.random.Generator) -> np.ndarray:
    image = Image.new("L", (width, height))
    pen, unit = ImageDraw.Draw(image), min(height, width) / 256
    if generator.random() < _BOX_SHARE:
        for _ in range(_count(strength.boxes, generator)):
            wide, high = (max(1.0, unit * generator.uniform(*strength.side)) for _ in range(2))
            left, top = (
                generator.uniform(0, max(1.0, width - wide)),
                generator.uniform(0, max(1.0, height - high)),
            )
            pen.rectangle((left, top, left + wide - 1, top + high - 1), fill=1)
        return np.asarray(image, dtype=np.uint8)
    for _ in range(_count(strength.chains, generator)):
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        thickness = max(1, round(unit * generator.uniform(*strength.width)))
        for _ in range(_count(_PIECES, generator)):
            angle, length = generator.uniform(0, 2 * math.pi), unit * generator.uniform(*strength.length)
            to_x = min(max(x + length * math.cos(angle), 0), width - 1)
            to_y = min(max(y + length * math.sin(angle), 0), height - 1)
            pen.line((x, y, to_x, to_y), fill=1, width=thickness)
            radius = thickness / 2
            pen.ellipse((to_x - radius, to_y - radius, to_x + radius, to_y + radius), fill=1)
            x, y = to_x, to_y
    return np.asarray(image, dtype=np.uint8)


def _count(limits: tuple[int, int], generator: np.random.Generator) -> int:
    return int(generator.integers(limits[0], limits[1] + 1))

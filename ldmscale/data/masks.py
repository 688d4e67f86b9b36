"""Holes for inpainting: thin, medium and thick masks of strokes and boxes.

In the manner of LaMa (Suvorov et al. 2022), whose masks the paper's inpainting model is trained on: a mask is
either polygonal chains of strokes with round ends, or boxes. Lengths are given for a side of 256 pixels and
grow with the image. The strengths differ by width and number of strokes and by size of the boxes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw


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

"""Small images for super-resolution, made of the large ones that are trained on.

Two degradations, both a function of the image and a generator alone:

    bicubic   Pillow's antialiased bicubic filter, as benchmarks of super-resolution do it
    blind     Gaussian blur, a resize by a filter drawn at random, Gaussian noise, JPEG: the chain of BSRGAN (Zhang et
              al. 2021), which the released bsr_sr was trained on, without its random order, its anisotropic kernels,
              its second pass and its noise of sensors
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

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

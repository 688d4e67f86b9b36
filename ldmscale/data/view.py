"""The part of an image that is trained on: one crop and one flip, the same for all that belongs to the image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class View(NamedTuple):
    """A window of an image in its pixels, mirrored after it was cut or not."""

    left: int
    top: int
    width: int
    height: int
    mirrored: bool


def view_of(
    width: int,
    height: int,
    size: tuple[int, int],
    crop: str = "center",
    flip: bool = False,
    draws: np.random.Generator | None = None,
) -> View:
    """The largest window of the ratio of `size` that fits into an image of width x height pixels.

    Args:
        size: (width, height) that the window is scaled to.
        crop: "center", or "random" along the side that is too long.
        flip: mirror every second view.
        draws: gives the window's place, then the flip: a fresh generator of the sample's (seed, position, "crop").
    """
    wide, high = size
    view_width = min(width, max(1, round(height * wide / high)))
    view_height = min(height, max(1, round(width * high / wide)))
    place = draws.random() if crop == "random" and draws is not None else 0.5
    left, top = int((width - view_width) * place), int((height - view_height) * place)
    mirrored = bool(flip and draws is not None and draws.random() < 0.5)
    return View(left, top, view_width, view_height, mirrored)

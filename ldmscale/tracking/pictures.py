"""Pictures of a run as PNG files: one image or a tiled batch, with the captions inside the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

_GAP = 2  # pixels of white between tiles


def tile(images: NDArray[np.uint8], columns: int | None = None) -> NDArray[np.uint8]:
    """Images [N, H, W, 3] as one picture, row by row, in `columns` columns (about a square unless given)."""
    count, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    shape = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels)
    picture = np.full(shape, 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        picture[top : top + height, left : left + width] = image
    return picture


def write_png(path: Path, picture: NDArray[np.uint8], captions: Sequence[str] = ()) -> None:
    """Write uint8 [H, W, 3] to `path`, whole or not at all; captions go into the text chunk "captions" as a
    JSON list.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if captions:
        info.add_itxt("captions", json.dumps(list(captions), ensure_ascii=False))
    beside = path.with_name(f".{path.name}.tmp")
    Image.fromarray(np.ascontiguousarray(picture)).save(beside, format="PNG", pnginfo=info)
    os.replace(beside, path)

"""Pictures of a run as PNG files: one image or a tiled batch, with the captions inside the file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldmscale.storage.atomic import finished_file

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
    info = PngInfo()
    if captions:
        info.add_itxt("captions", json.dumps(list(captions), ensure_ascii=False))
    with finished_file(path, durable=False) as temporary:
        Image.fromarray(np.ascontiguousarray(picture)).save(temporary, format="PNG", pnginfo=info)


def to_uint8(images: Tensor) -> np.ndarray:
    """float [B,3,H,W] in [-1,1] -> uint8 [B,H,W,3]."""
    bytes_ = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    array: np.ndarray = bytes_.permute(0, 2, 3, 1).cpu().numpy()
    return array


def on_equal_canvas(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [H,W,3] of several sizes, each in the middle of white of the largest height and width: [N,H,W,3]."""
    high, wide = (max(image.shape[axis] for image in images) for axis in (0, 1))
    canvas = np.full((len(images), high, wide, 3), 255, dtype=np.uint8)
    for place, image in zip(canvas, images, strict=True):
        top, left = (high - image.shape[0]) // 2, (wide - image.shape[1]) // 2
        place[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def side_by_side(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Two rows of uint8 [N,H,W,3], pairs above each other, as one [2H,N*W,3]."""
    return tile(np.concatenate([above, below]), columns=len(above))


def captioned(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], header: Sequence[str], cell: int = 96
) -> np.ndarray:
    """A sheet for people: a row for each (caption, images uint8 [H,W,3]), with column titles. Returns uint8 [H,W,3]."""
    text_width, line = 360, cell + 6
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("RGB", (text_width + columns * line, 24 + len(rows) * line), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(header):
        pen.text((text_width + column * line, 6), title, fill="black")
    for row, (caption, images) in enumerate(rows):
        top = 24 + row * line
        pen.text((8, top + cell // 2 - 6), caption, fill="black")
        for column, image in enumerate(images):
            scaled = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(scaled, (text_width + column * line, top))
    return np.asarray(sheet)

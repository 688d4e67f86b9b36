"""Tensors as pictures: conversion to bytes and grids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ldmscale.tracking.pictures import tile


def to_uint8(images: Tensor) -> np.ndarray:
    """float [B,3,H,W] in [-1,1] -> uint8 [B,H,W,3]."""
    bytes_ = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    array: np.ndarray = bytes_.permute(0, 2, 3, 1).cpu().numpy()
    return array


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

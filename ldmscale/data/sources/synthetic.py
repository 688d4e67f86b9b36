"""The few made-up shards of `data=synthetic`: coloured shapes with captions, as images or as latents of no autoencoder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image, ImageDraw

from ldmscale.data.latents.format import NEWEST, LatentFormat
from ldmscale.data.latents.sample_record import SampleView
from ldmscale.data.latents.writer import LatentShardWriter, finish_set, is_finished, written_version
from ldmscale.distributed.rng import generator

COLOURS = ("red", "green", "blue", "orange")
SHAPES = ("circle", "square", "triangle")
SHARDS, SAMPLES_PER_SHARD = 2, 24


def synthetic_shards(folder: Path, kind: str, image_size: int, latent_channels: int, factor: int) -> None:
    """Write SHARDS tars into `folder`, unless they are there: 24 samples each, every colour and shape equally often."""
    side = image_size // factor
    # A run of an earlier release has shards of an earlier version, and goes on with them.
    version = (written_version(folder) if kind == "latents" else None) or NEWEST
    format = LatentFormat(
        "synthetic",
        "moments",
        "float32",
        (latent_channels, side, side),
        {"size": image_size},
        version=version,
    )
    names = [f"{number:05d}.tar" for number in range(SHARDS)]
    for number, name in enumerate(names):
        keys = [number * SAMPLES_PER_SHARD + i for i in range(SAMPLES_PER_SHARD)]
        if kind == "latents":
            if not is_finished(folder, name, format):
                _write_latents(folder, name, format, keys)
        elif not (folder / name).exists():
            _write_images(folder / name, keys, image_size)
    if kind == "latents":
        finish_set(folder, names, format)


def _words(key: int) -> tuple[str, str]:
    return COLOURS[key % len(COLOURS)], SHAPES[key // len(COLOURS) % len(SHAPES)]


def _told(key: int, size: int) -> dict[str, Any]:
    """The shape as a number and as a name, and where it is in a picture of `size` pixels."""
    shape = _words(key)[1]
    left, top, right, bottom = (corner / size for corner in _box(key, size))
    boxes = [{"class": shape, "box": [left, top, right, bottom]}]
    return {"label": SHAPES.index(shape), "class": shape, "boxes": boxes, "width": size, "height": size}


def _box(key: int, size: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom; the place is drawn from the key."""
    left, top = generator(0, key, "shape").integers(0, max(1, size // 3), 2).tolist()
    return left, top, left + size * 3 // 5, top + size * 3 // 5


def _write_images(path: Path, keys: list[int], size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for key in keys:
            caption = " ".join(_words(key))
            buffer = io.BytesIO()
            Image.fromarray(_picture(key, size)).save(buffer, "PNG")
            tar.write(
                {
                    "__key__": f"{key:06d}",
                    "png": buffer.getvalue(),
                    "txt": caption,
                    "json": {"caption": caption, **_told(key, size)},
                }
            )


def _write_latents(folder: Path, name: str, format: LatentFormat, keys: list[int]) -> None:
    channels, side, _ = format.shape
    with LatentShardWriter(folder, name, format) as writer:
        for key in keys:
            small = Image.fromarray(_picture(key, side * 8)).resize((side, side), Image.Resampling.BOX)
            colour = np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1  # [3,h,w]
            mean = np.resize(colour, (channels, side, side))
            writer.write(
                f"{key:06d}",
                np.concatenate([mean, np.full_like(mean, -6.0)]),
                " ".join(_words(key)),
                _told(key, side * 8),
                view=SampleView((side * 8, side * 8), (0, 0), (side * 8, side * 8), (side * 8, side * 8)),
                captions={"txt": " ".join(_words(key))},
            )


def _picture(key: int, size: int) -> np.ndarray:
    """uint8 [size,size,3]: one shape on white."""
    (colour, shape), box = _words(key), _box(key, size)
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=colour)
    return np.asarray(image)

"""Conditions that the quickstart's sprites tell by themselves, and scenes made of several sprites.

boxes    of what is not transparent
map      each pixel's colour, as the nearest of a dozen (the sprite laid over white)
scenes   one to three sprites on a white square, with a box each: a single sprite is always in the middle, so that
         its box says little
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldmscale.data.sources.writer import Item, write_shards
from ldmscale.distributed.rng import generator

PALETTE = {
    "white": (255, 255, 255),
    "black": (25, 25, 30),
    "grey": (140, 140, 145),
    "red": (215, 60, 55),
    "orange": (235, 140, 50),
    "yellow": (250, 210, 70),
    "green": (75, 170, 80),
    "cyan": (110, 205, 235),
    "blue": (50, 110, 190),
    "purple": (130, 85, 175),
    "pink": (240, 165, 190),
    "brown": (145, 95, 60),
}
"""The classes of a map, numbered from 0, as RGB."""

SCENE_SIDE = 64  # pixels
SCENES = 1536  # of training; a twelfth of it is held out
_SCENES_PER_SHARD = 128
_OBJECTS = (1, 3)
_SHARE = (0.3, 0.6)  # the longer side of a sprite, of the scene's
_TRIES = 20  # to find a place where a sprite covers next to nothing of another
_COVERED = 0.1  # of a box's area, at most
_VISIBLE = 64  # of 255, alpha


class Sprite(NamedTuple):
    """A picture with transparency, and what it shows."""

    image: Image.Image  # RGBA
    name: str


class Scene(NamedTuple):
    """A picture and its objects, as `layouts.raw_boxes` reads them."""

    image: Image.Image  # RGBA
    boxes: list[dict[str, Any]]


def box_of(image: Image.Image) -> tuple[int, int, int, int] | None:
    """The corners (left, top, right, bottom) of what an RGBA picture shows, in pixels; None where it shows nothing."""
    return image.getchannel("A").point(lambda alpha: 255 if alpha >= _VISIBLE else 0).getbbox()


def object_of(name: str, box: tuple[int, int, int, int], size: tuple[int, int]) -> dict[str, Any]:
    """An object of a sample's json."""
    width, height = size
    corners = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    return {"class": name, "box": [round(corner, 4) for corner in corners]}


def nearest_colours(pixels: np.ndarray) -> np.ndarray:
    """Numbers of PALETTE uint8 [H,W] of pixels uint8 [H,W,3]: of the least squared distance."""
    palette = np.array(list(PALETTE.values()), dtype=np.int32)  # [12,3]
    distance = ((pixels[..., None, :].astype(np.int32) - palette) ** 2).sum(-1)  # [H,W,12]
    numbers: np.ndarray = distance.argmin(-1).astype(np.uint8)
    return numbers


def map_png(image: Image.Image) -> bytes:
    """The map of an RGBA picture, as a palette PNG of its size."""
    over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    numbers = Image.fromarray(nearest_colours(np.asarray(over_white)), "P")
    numbers.putpalette([value for colour in PALETTE.values() for value in colour])
    buffer = io.BytesIO()
    numbers.save(buffer, "PNG")
    return buffer.getvalue()


def scene_of(sprites: Sequence[Sprite], seed: int, number: int) -> Scene:
    """Scene `number`: a function of (seed, number) and the sprites."""
    draws = generator(seed, number, "scene")
    scene = Image.new("RGBA", (SCENE_SIDE, SCENE_SIDE), (255, 255, 255, 0))
    boxes: list[tuple[int, int, int, int]] = []
    objects = []
    for _ in range(int(draws.integers(_OBJECTS[0], _OBJECTS[1] + 1))):
        sprite = sprites[int(draws.integers(len(sprites)))]
        side = draws.uniform(*_SHARE) * SCENE_SIDE
        scale = side / max(sprite.image.size)
        size = tuple(max(1, round(length * scale)) for length in sprite.image.size)
        small = sprite.image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        places = draws.uniform(size=(_TRIES, 2))
        shown = box_of(small)
        if shown is None:
            continue
        for x, y in places:
            left, top = int(x * (SCENE_SIDE - size[0] + 1)), int(y * (SCENE_SIDE - size[1] + 1))
            box = (left + shown[0], top + shown[1], left + shown[2], top + shown[3])
            if all(max(_share(box, other), _share(other, box)) <= _COVERED for other in boxes):
                scene.alpha_composite(small, (left, top))
                boxes.append(box)
                objects.append(object_of(sprite.name, box, scene.size))
                break
    return Scene(scene, objects)


def on_square(item: Item) -> Item:
    """A sprite in the middle of a transparent square as large as its longer side, with its box and its map."""
    image = Image.open(io.BytesIO(item.image)).convert("RGBA")
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, format="PNG")
    metadata = {
        **item.metadata,
        "width": side,
        "height": side,
        "original_width": width,
        "original_height": height,
    }
    box = box_of(square)
    metadata["boxes"] = [] if box is None else [object_of(metadata["class"], box, square.size)]
    return Item(item.key, buffer.getvalue(), "png", item.caption, metadata, {"map.png": map_png(square)})


def write_scenes(train: Sequence[Item], heldout: Sequence[Item], target: Path, seed: int) -> tuple[str, ...]:
    """Scenes of the training sprites, and some of the held-out ones."""
    paths = []
    for items, prefix, count, first in (
        (train, "scenes-train", SCENES, 0),
        (heldout, "scenes-heldout", SCENES // 12, SCENES),
    ):
        sprites = [
            Sprite(Image.open(io.BytesIO(item.image)).convert("RGBA"), item.metadata["class"])
            for item in items
        ]
        scenes = (_scene_item(scene_of(sprites, seed, first + i), i) for i in range(count))
        paths += write_shards(scenes, target, prefix, _SCENES_PER_SHARD)
    return tuple(map(str, paths))


def _scene_item(scene: Scene, number: int) -> Item:
    names = [str(found["class"]) for found in scene.boxes] or ["nothing"]
    buffer = io.BytesIO()
    scene.image.save(buffer, format="PNG")
    width, height = scene.image.size
    metadata = {"class": names[0], "boxes": scene.boxes, "width": width, "height": height}
    return Item(f"scene-{number:05d}", buffer.getvalue(), "png", " and ".join(names), metadata)


def _share(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """The share of a box that another covers."""
    wide = min(box[2], other[2]) - max(box[0], other[0])
    high = min(box[3], other[3]) - max(box[1], other[1])
    return max(0, wide) * max(0, high) / ((box[2] - box[0]) * (box[3] - box[1]))

"""Maps of classes: pictures whose pixels are class numbers, beside the image of a sample."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldmscale.data.images.decode import MAX_PIXELS, image_header, image_member, view_of
from ldmscale.errors import DataError


@dataclass(frozen=True)
class ClassMaps:
    """Semantic synthesis: adds "spatial" int64 [H', W'], the map of a sample in the view that its image is seen in.

    Attributes:
        member: of the sample, such as "map.png": grey or palette, 8 or 16 bits, of the image's size, a class number a pixel.
        classes: numbers are 0 to classes - 1.
        scale: side of the map over side of the image as trained on; the spatial rescaler brings it to the latent's size.
    """

    member: str
    classes: int
    scale: float

    def of(
        self,
        members: Mapping[str, bytes],
        size: tuple[int, int],
        crop: str = "center",
        flip: bool = False,
        draws: np.random.Generator | None = None,
        max_pixels: int = MAX_PIXELS,
        crop_shares: tuple[float, float] = (1.0, 1.0),
    ) -> np.ndarray:
        """The map, cropped, scaled (nearest) and mirrored as `decode.decode_image` does it with the image.

        Args:
            size: (width, height) of the image as trained on. crop, flip, max_pixels, crop_shares: as for the image.
            draws: a fresh generator of the same (seed, position, purpose) as the image's.

        Raises:
            DataError: if there is no map, it is no map, of another size than the image, or has a number that is no class.
        """
        numbers = read_map(members, self.member, self.classes, max_pixels)
        height, width = numbers.shape
        header = image_header(image_member(dict(members))[1], max_pixels=max_pixels)
        if (header.width, header.height) != (width, height):
            raise DataError(
                f"its map ({self.member}) has {width}x{height} pixels, its image {header.width}x{header.height}"
            )
        view = view_of(width, height, size, crop, flip, draws, crop_shares)
        part = numbers[view.top : view.top + view.height, view.left : view.left + view.width]
        scaled = nearest(part, round(size[0] * self.scale), round(size[1] * self.scale))
        return np.ascontiguousarray(scaled[:, ::-1] if view.mirrored else scaled, dtype=np.int64)


def read_map(
    members: Mapping[str, bytes], member: str, classes: int, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The class numbers of a sample's map, int64 [H, W].

    Raises:
        DataError: as `ClassMaps.of`, but for the size.
    """
    if member not in members:
        raise DataError(
            f"has no {member} member for the map (members: {', '.join(sorted(members)) or 'none'})"
        )
    return map_of(members[member], f"its map ({member})", classes, max_pixels)


def map_of(data: bytes, name: str, classes: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Class numbers of a picture's bytes, int64 [H, W].

    Raises:
        DataError: beginning with `name`.
    """
    try:
        header = image_header(data, max_pixels=max_pixels)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            mode, numbers = picture.mode, np.asarray(picture)
    except Exception as error:  # decoders raise anything
        raise DataError(f"{name} is no PNG that can be read: {error}") from error
    if mode not in ("L", "P") and not mode.startswith("I"):
        raise DataError(
            f"{name} is a {mode} picture of {header.width}x{header.height}; expected grey or palette: a class a pixel"
        )
    found = numbers.astype(np.int64)
    if found.size and (found.max() >= classes or found.min() < 0):
        raise DataError(f"{name} has the number {int(found.max())}: there are {classes} classes")
    return found


def nearest(numbers: np.ndarray, width: int, height: int) -> np.ndarray:
    """[H, W] to [height, width] by the pixel whose middle is nearest."""
    rows = ((np.arange(height) + 0.5) * numbers.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * numbers.shape[1] / width).astype(np.int64)
    scaled: np.ndarray = numbers[rows[:, None], columns[None, :]]
    return scaled

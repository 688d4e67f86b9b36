"""Bytes of images and latents to arrays. Of images the header comes first, then the pixels.

The header is read before anything is decoded, so that a small file that unpacks to gigabytes is refused at
the price of a few bytes. Whatever a decoder raises becomes a `DataError` with the reason; the loader replaces
such a sample.
"""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ldmscale.errors import DataError

# Pillow's own limit on pixels would stop what data.max_pixels allows; ours looks at the header, too, before decoding.
Image.MAX_IMAGE_PIXELS = None
# Editors write megabytes of XMP and colour profiles, which Pillow's limit of 1 MiB per chunk refuses.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20

MAX_PIXELS = 89_000_000
"""Largest image that is decoded unless the configuration says otherwise."""

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
"""Member names that count as a sample's image."""

LATENT = "latent.npy"
"""Member name of a latent."""

_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
_ORIENTATION = 0x0112

# Parsing the text that a .npy begins with takes longer than all the rest, and all latents of a set begin alike.
_NPY_HEAD = 128  # bytes of the header of nearly every .npy
_npy_heads: dict[bytes, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
_LYING = (5, 6, 7, 8)  # orientations in which width and height change places
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING_TURNS = tuple(_TURNS[number] for number in _LYING)


class ImageHeader(NamedTuple):
    width: int  # as the image is seen: the orientation of EXIF or XMP is applied
    height: int
    format: str  # as Pillow names it: "JPEG", "PNG", "WEBP" ...


def image_member(members: dict[str, bytes]) -> tuple[str, bytes]:
    """Returns (extension, bytes) of a sample's image.

    Raises:
        DataError: if it has none.
    """
    for extension in EXTENSIONS:
        if extension in members:
            return extension, members[extension]
    raise DataError(
        f"has no image (members: {', '.join(sorted(members)) or 'none'}; images end with "
        f"{', '.join(EXTENSIONS)})"
    )


def image_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Reads an image's size and format without decoding it.

    Raises:
        DataError: if it is empty, no image of a known format, or larger than `max_pixels`.
    """
    image = _opened(data, max_pixels)
    width, height = image.size
    if _turn(image) in _LYING_TURNS:
        width, height = height, width
    # Phones write several pictures into one JPEG; Pillow has a name of its own for those.
    return ImageHeader(width, height, (image.format or "").replace("MPO", "JPEG"))


def rgb_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image as training sees it: upright, transparent pixels over white, 16-bit grey scaled to 8 bits.

    Raises:
        DataError: if the bytes are no image that can be decoded, or too large.
    """
    image = _opened(data, max_pixels)
    try:
        turn = _turn(image)
        pixels = _rgb(image)
        return pixels if turn is None else pixels.transpose(turn)
    except Exception as error:  # decoders raise anything
        raise DataError(f"the image cannot be decoded: {error}") from error


def format_of(extension: str) -> str:
    """The format that an extension promises, as Pillow names it."""
    return _FORMATS[extension]


def verify_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Decodes every pixel and throws them away.

    Raises:
        DataError: if that fails.
    """
    image = _opened(data, max_pixels)
    try:
        image.load()
    except Exception as error:  # decoders raise anything
        raise DataError(f"the image cannot be decoded: {error}") from error


def decode_image(
    data: bytes,
    *,
    size: int | tuple[int, int],
    crop: str = "center",
    flip: bool = False,
    generator: np.random.Generator | None = None,
    max_pixels: int = MAX_PIXELS,
    decoder: str = "pillow",
    out: np.ndarray | None = None,
    crop_shares: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Decodes an image, crops it to the wanted aspect ratio and scales it once (antialiased bicubic).

    Transparent pixels are laid over white, the orientation of EXIF or XMP is applied, the first frame of an
    animation counts, and 16-bit grey is scaled to 8 bits. The crop is the largest of the ratio that fits, or a
    share of it.

    Args:
        size: side of the resulting square in pixels, or (width, height).
        crop: "center", or "random".
        flip: mirror every second image left to right (by the generator).
        generator: gives the crop's place, then the flip; needed for `crop="random"` and `flip`.
        max_pixels: refuse larger images before decoding them.
        decoder: of JPEGs: "pillow", or "turbo", libjpeg-turbo itself through simplejpeg, which copies less.
        out: takes the result, and is returned.
        crop_shares: as `view_of`.

    Returns:
        uint8 [3, height, width].

    Raises:
        DataError: if the bytes are no image that can be decoded, or too large.
        ValueError: if `crop` is unknown or a generator is missing.
    """
    if crop not in ("center", "random"):
        raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
    if (crop == "random" or flip or crop_shares != (1.0, 1.0)) and generator is None:
        raise ValueError("a random crop or flip needs the sample's generator")
    wide, high = (size, size) if isinstance(size, int) else size
    image = _opened(data, max_pixels)
    try:
        # The smallest window that may be drawn still has twice the wanted size.
        least_wide, least_high = math.ceil(wide / crop_shares[0]), math.ceil(high / crop_shares[0])
        pixels = _pixels(image, data, least_wide, least_high, decoder)  # [H, W, 3]
    except Exception as error:  # decoders raise anything
        raise DataError(f"the image cannot be decoded: {error}") from error
    height, width, _ = pixels.shape
    view = view_of(width, height, (wide, high), crop, flip, generator, crop_shares)
    part = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    scaled = _scaled(part, wide, high)
    if view.mirrored:
        scaled = scaled[:, :, ::-1]
    if out is None:
        return np.ascontiguousarray(scaled)
    np.copyto(out, scaled)
    return out


def _pixels(image: Image.Image, data: bytes, wide: int, high: int, decoder: str) -> np.ndarray:
    """Upright uint8 [H, W, 3], at least twice as large as wanted where the image is."""
    turn = _turn(image)
    if image.format in ("JPEG", "MPO"):
        # JPEG can be decoded at 1/2, 1/4 or 1/8: twice the wanted size is left to the antialiased filter.
        width, height = image.size
        if turn in _LYING_TURNS:
            wide, high = high, wide
        fits = max(wide / width, high / height)
        reduction = next((step for step in (8, 4, 2) if 2 * fits * step <= 1), 1)
        reduced = (-(-width // reduction), -(-height // reduction))
        if decoder == "turbo" and image.mode in ("RGB", "L"):
            import simplejpeg  # optional: extra `fast`

            array: np.ndarray = simplejpeg.decode_jpeg(
                data, "RGB", min_width=reduced[0], min_height=reduced[1], min_factor=reduction
            )
            return array if turn is None else np.asarray(Image.fromarray(array).transpose(turn))
        if reduction > 1:
            image.draft("RGB", (width // reduction, height // reduction))
    pixels = _rgb(image)
    return np.asarray(pixels if turn is None else pixels.transpose(turn), dtype=np.uint8)


def _scaled(pixels: np.ndarray, wide: int, high: int) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [3, high, wide], by Pillow's bicubic filter.

    PyTorch's implementation of it is two to ten times as fast, and differs by single steps of 255 here and there.
    """
    import torch
    from torch.nn import functional

    whole = np.require(pixels, requirements=("C", "W"))
    image = torch.from_numpy(whole).permute(2, 0, 1)  # [3, H, W], channels last
    if image.shape[1:] != (high, wide):
        image = functional.interpolate(image[None], (high, wide), mode="bicubic", antialias=True)[0]
    array: np.ndarray = image.contiguous().numpy()
    return array


def decode_array(data: bytes) -> np.ndarray:
    """Parses the bytes of a .npy file of finite floats; never unpickles. uint16 are the bits of bfloat16.

    Raises:
        DataError: if they are none.
    """
    head = data[:_NPY_HEAD]
    known = _npy_heads.get(head)
    if known is not None and len(data) == _NPY_HEAD + known[2]:
        array: np.ndarray = np.frombuffer(data, known[0], offset=_NPY_HEAD).reshape(known[1])
    else:
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # numpy raises several kinds
            raise DataError(f"the latent is no array that can be read: {error}") from error
        if (
            isinstance(array, np.ndarray)
            and len(data) == _NPY_HEAD + array.nbytes
            and array.flags.c_contiguous
        ):
            if len(_npy_heads) > 16:
                _npy_heads.clear()
            _npy_heads[head] = (array.dtype, array.shape, array.nbytes)
    if not isinstance(array, np.ndarray) or not _is_float(array) or not _finite(array):
        raise DataError("the latent is no array of finite floats")
    return array


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype == np.uint16


def _finite(array: np.ndarray) -> bool:
    if array.dtype == np.uint16:
        return bool(((array & 0x7F80) != 0x7F80).all())
    if array.dtype == np.float16:  # slow in numpy; its exponent is all ones where a value is not finite
        return bool(((array.view(np.uint16) & 0x7C00) != 0x7C00).all())
    return bool(np.isfinite(array).all())


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise DataError("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=sorted(set(_FORMATS.values())))
    except UnidentifiedImageError as error:
        raise DataError(
            f"the {len(data)} bytes are no image of a known format "
            f"({', '.join(sorted(set(_FORMATS.values())))})"
        ) from error
    except Exception as error:  # decoders raise anything
        raise DataError(f"the image cannot be opened: {error}") from error
    if image.width * image.height > max_pixels:
        raise DataError(
            f"the image is too large: {image.width}x{image.height} is more than {max_pixels} pixels; scale it down, or "
            "raise data.max_pixels where the job has it"
        )
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, by EXIF, else by XMP, as far as it stands before the pixels.

    The same for the header and the pixels. Pillow's own method for PNGs decodes the whole file to look behind them.
    """
    try:
        return _TURNS.get(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # Pillow raises anything on EXIF that is cut; the pixels may be whole
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        scale = 255.0 / 65535.0 if image.mode != "F" else 255.0
        image = Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    image.load()
    return image.convert("RGB")


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
    shares: tuple[float, float] = (1.0, 1.0),
) -> View:
    """A window of the ratio of `size` in an image of width x height pixels.

    Args:
        size: (width, height) that the window is scaled to.
        crop: "center", or "random": every place where the window fits is equally likely.
        flip: mirror every second view.
        draws: gives the window's size and place, then the flip: a fresh generator of the sample's
            (seed, position, "crop").
        shares: least and most that the window's sides are of those of the largest window that fits; drawn uniformly.
            (0.5, 1) is the zoomed crop of the published super-resolution data (CompVis' min_crop_f and max_crop_f).
    """
    wide, high = size
    view_width = min(width, max(1, round(height * wide / high)))
    view_height = min(height, max(1, round(width * high / wide)))
    zoomed = shares != (1.0, 1.0) and draws is not None
    if zoomed:
        assert draws is not None
        share = shares[0] + (shares[1] - shares[0]) * draws.random()
        view_width, view_height = max(1, int(view_width * share)), max(1, int(view_height * share))
    if crop == "random" and draws is not None:
        across = draws.random()
        down = draws.random() if zoomed else across  # one of the two has no room without zoom
        left, top = int((width - view_width + 1) * across), int((height - view_height + 1) * down)
    else:
        left, top = (width - view_width) // 2, (height - view_height) // 2
    mirrored = bool(flip and draws is not None and draws.random() < 0.5)
    return View(left, top, view_width, view_height, mirrored)

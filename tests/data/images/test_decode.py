"""Images become uint8 squares; what cannot or must not be decoded is refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldmscale.data.images.decode import (
    decode_image,
    image_header,
    image_member,
    rgb_image,
    verify_image,
    view_of,
)
from ldmscale.distributed.rng import generator
from ldmscale.errors import DataError

MakeImage = Callable[..., bytes]


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG of 1x1 whose header, checksum included, claims another size."""
    data = bytearray(saved(Image.new("RGB", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(("width", "height"), [(20, 16), (16, 20), (5, 300), (8, 8), (3, 2)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_shape_becomes_the_asked_square(
    make_image: MakeImage, width: int, height: int, crop: str
) -> None:
    array = decode_image(make_image(width, height), size=8, crop=crop, generator=generator(0, 0, "crop"))
    assert array.shape == (3, 8, 8) and array.dtype == np.uint8 and array.flags["C_CONTIGUOUS"]


def test_at_its_own_size_an_image_comes_back_bit_for_bit(make_image: MakeImage) -> None:
    data = make_image(12, 12)
    assert np.array_equal(
        decode_image(data, size=12), np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    )


def test_the_centre_is_cut(make_image: MakeImage) -> None:
    data = make_image(21, 12)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data, size=12), pixels[:, 4:16].transpose(2, 0, 1))


def test_random_crops_and_flips_belong_to_the_generator(make_image: MakeImage) -> None:
    data = make_image(64, 16)
    crops = [
        decode_image(
            data, size=16, crop="random", flip=True, generator=generator(0, position, "crop")
        ).tobytes()
        for position in (0, 0, 1, 2, 3)
    ]
    assert crops[0] == crops[1] and len(set(crops)) == 4
    whole = make_image(16, 16)
    both = {
        decode_image(whole, size=16, flip=True, generator=generator(0, p, "crop")).tobytes()
        for p in range(20)
    }
    straight = decode_image(whole, size=16)
    assert both == {straight.tobytes(), straight[:, :, ::-1].tobytes()}


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    for format in ("PNG", "JPEG"):
        small = decode_image(saved(Image.fromarray(stripes), format), size=8).astype(int)
        assert np.abs(small - 128).max() < 12  # a filter that skips pixels gives 0 or 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    image.paste((200, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        flat = Image.new("P", (8, 8), 1)
        flat.putpalette([200, 0, 0, 10, 20, 30])
        flat.paste(0, (0, 0, 4, 8))
        data = saved(flat, transparency=1)
    else:
        data = saved(image.convert(mode))
    array = decode_image(data, size=8)
    assert (array[:, :, 4:] == 255).all() and (array[:, :, :4] != 255).any()


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    array = decode_image(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128))), size=4)
    assert np.abs(array.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    array = decode_image(saved(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"), size=8)
    assert array.shape == (3, 8, 8) and array.min() >= 250


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.full((8, 8), 32768, dtype=np.uint16)
    assert np.abs(decode_image(saved(Image.fromarray(grey)), size=8).astype(int) - 128).max() <= 1


def test_the_exif_orientation_is_applied() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # white at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left becomes the top
    array = decode_image(saved(Image.fromarray(pixels), "JPEG", exif=exif, quality=95), size=16)
    assert array[:, :7].min() > 240 and array[:, 9:].max() < 15


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    array = decode_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), size=8)
    assert (array[0] > 250).all() and (array[2] < 5).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_headers_are_read_without_decoding(make_image: MakeImage, format: str) -> None:
    data = make_image(300, 200, format=format)
    assert len(data) > 3000 and image_header(data) == (300, 200, format)
    if format in ("JPEG", "PNG"):
        assert image_header(data[:1000]) == (300, 200, format)  # the pixels are not there


def test_a_phone_s_jpeg_of_several_pictures_is_a_jpeg() -> None:
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    data = saved(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert image_header(data) == (40, 30, "JPEG") and decode_image(data, size=8)[0].min() > 240


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (9500, 9500), (2**31 - 1, 1)])
def test_huge_images_are_refused_by_their_header(width: int, height: int) -> None:
    for call in (image_header, verify_image, lambda data: decode_image(data, size=8)):
        with pytest.raises(DataError, match=r"too large.*data\.max_pixels"):
            call(claiming(width, height))


def test_the_limit_can_be_moved(make_image: MakeImage) -> None:
    with pytest.raises(DataError, match="20x16 is more than 100 pixels"):
        decode_image(make_image(20, 16), size=8, max_pixels=100)
    # Above Pillow's own limit of warning, below ours: a claim of 90 million pixels is then only a broken
    # image.
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(claiming(10_000, 9_500), size=8, max_pixels=100_000_000)


def test_broken_bytes_give_the_reason(make_image: MakeImage) -> None:
    jpeg = make_image(300, 200, format="JPEG")
    png = bytearray(make_image(30, 20))
    png[60] ^= 0xFF
    for data, reason in [
        (b"", "empty"),
        (b"<html>", "no image of a known format"),
        (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        (bytes(png), "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
    ]:
        with pytest.raises(DataError, match=reason):
            decode_image(data, size=8)
        if data != bytes(png):
            with pytest.raises(DataError, match=reason):
                verify_image(data)


def test_a_sample_s_image_is_found_by_its_extension() -> None:
    assert image_member({"txt": b"t", "webp": b"w"}) == ("webp", b"w")
    with pytest.raises(DataError, match=r"no image \(members: txt"):
        image_member({"txt": b"t"})


def test_wrong_arguments_are_refused(make_image: MakeImage) -> None:
    with pytest.raises(ValueError, match="'center' or 'random'"):
        decode_image(make_image(), size=8, crop="centre")
    with pytest.raises(ValueError, match="generator"):
        decode_image(make_image(), size=8, crop="random")


@pytest.mark.parametrize("size", [(700, 500), (320, 288), (90, 200), (30, 30)])
@pytest.mark.parametrize("wanted", [64, (96, 48)])
def test_both_decoders_give_the_same_pixels(size: tuple[int, int], wanted: int | tuple[int, int]) -> None:
    draws = np.random.default_rng(1).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(draws).resize(size, Image.Resampling.BICUBIC)
    for mode in ("RGB", "L"):
        image.convert(mode).save(buffer, "JPEG", quality=90)
        one, other = (
            decode_image(buffer.getvalue(), size=wanted, decoder=name) for name in ("pillow", "turbo")
        )
        assert one.shape == (3, 64, 64) if wanted == 64 else (3, 48, 96)
        assert np.abs(one.astype(int) - other).max() <= 3


def test_scaling_is_pillow_s_bicubic(make_image: MakeImage) -> None:
    data = make_image(200, 200, seed=3)
    wanted = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BICUBIC)
    found = decode_image(data, size=64).transpose(1, 2, 0).astype(int)
    assert np.abs(found - np.asarray(wanted)).max() <= 2


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
)
CORNER = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
CORNER |= {5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("where", ["exif", "xmp"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_of_one_source(format: str, where: str, orientation: int) -> None:
    """The first row and column lie where the EXIF standard (table 6) puts them, and the header agrees."""
    pixels = np.zeros((40, 48, 3), np.uint8)
    pixels[:10, :12] = 255
    if where == "exif":
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, object] = {"exif": exif}
    elif format == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", (XMP % orientation).decode())
        options = {"pnginfo": text}
    else:
        options = {"xmp": XMP % orientation}
    data = saved(Image.fromarray(pixels), format, **options)
    size = (40, 48) if orientation > 4 else (48, 40)
    assert image_header(data)[:2] == size
    vertical, horizontal = CORNER[orientation].split()
    for array in (np.asarray(rgb_image(data)), decode_image(data, size=size).transpose(1, 2, 0)):
        assert array.shape == (size[1], size[0], 3)
        corner = array[slice(0, 5) if vertical == "top" else slice(-5, None)]
        corner = corner[:, slice(0, 5) if horizontal == "left" else slice(-5, None)]
        assert corner.min() > 200 and array.mean() < 60


def test_a_png_with_much_text_or_a_large_profile_is_read() -> None:
    """3 MB of either pack to 9 KB; Pillow's own limit is 1 MiB per chunk."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    for data in (saved(image, pnginfo=text), saved(image, icc_profile=bytes(3_000_000))):
        assert np.array_equal(np.asarray(rgb_image(data)), np.asarray(image))
    with pytest.raises(DataError, match="cannot be opened"):  # 64 MB in 60 KB: the true reason
        rgb_image(saved(image, icc_profile=bytes(64_000_000)))


def test_images_are_opened_as_trained_everywhere() -> None:
    """Alpha lies over white, 16-bit grey keeps its range, for samples and for files given to `sample` alike."""
    half = saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    deep = saved(Image.fromarray(np.full((8, 8), 0x8080, np.uint16)))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for data, wanted in ((half, 127), (deep, 128), (saved(palette, transparency=1), 255)):
        assert np.abs(np.asarray(rgb_image(data)).astype(int) - wanted).max() <= 1
        assert np.array_equal(np.asarray(rgb_image(data)).transpose(2, 0, 1), decode_image(data, size=8))


def test_no_other_module_opens_images_of_users() -> None:
    package = Path(__file__).parents[3] / "ldmscale"
    own = {  # what ldmscale or a package of its own wrote
        "data/images/decode.py",
        "data/conditions/segmentation.py",  # numbers of classes, not colours
        "data/conditions/spatial.py",
        "data/sources/sprites.py",
        "inference/image_set.py",
        "jobs/wandb_sync.py",
    }
    found = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if "Image.open(" in path.read_text()
    }
    assert found == own


def test_every_place_of_a_random_crop_is_as_likely() -> None:
    """Of 5 columns a window of 3 has 3 places: a third of the draws each, the last one too."""
    lefts = [view_of(5, 3, (3, 3), "random", False, generator(0, n, "crop")).left for n in range(3000)]
    assert np.abs(np.bincount(lefts, minlength=4)[:3] - 1000).max() < 120 and max(lefts) == 2


def test_a_zoomed_crop_takes_shares_of_the_largest_window() -> None:
    views = [
        view_of(300, 200, (64, 64), "random", False, generator(1, n, "crop"), (0.5, 1.0)) for n in range(2000)
    ]
    sides = np.array([view.width for view in views])
    assert all(view.width == view.height for view in views)
    assert sides.min() >= 100 and sides.max() <= 200 and abs(sides.mean() - 150) < 3  # uniform
    assert all(view.left + view.width <= 300 and view.top + view.height <= 200 for view in views)
    tops = [view.top / (200 - view.height) for view in views if view.height < 180]
    assert min(tops) < 0.02 and max(tops) > 0.98 and abs(np.mean(tops) - 0.5) < 0.03
    centred = view_of(300, 200, (64, 64), "center", False, generator(1, 0, "crop"), (0.5, 0.5))
    assert centred[:4] == (100, 50, 100, 100)


def test_a_zoomed_crop_keeps_its_detail() -> None:
    """A JPEG is decoded at a scale that leaves the window its pixels: stripes of 16 pixels stay at a zoom of eight."""
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, (np.arange(1024) // 16) % 2 == 1] = 255
    data = saved(Image.fromarray(stripes), "JPEG", quality=95)
    array = decode_image(
        data, size=64, crop="random", generator=generator(0, 0, "crop"), crop_shares=(0.125, 0.125)
    )
    assert array.min() < 40 and array.max() > 215 and 0.4 < (array > 128).mean() < 0.6

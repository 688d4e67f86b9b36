"""Public bug reports about odd files, of comparable projects, tried on the readers here."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmscale.data.conditions.annotations import caption_of
from ldmscale.data.images.decode import rgb_image
from ldmscale.data.shards.scan import scan_shard
from ldmscale.data.tokenizers.bert import Tokenizer


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_one_broken_image_is_named_and_the_others_are_used() -> None:
    """d8ahazard/sd_dreambooth_extension#1416 (a decompression bomb) and lucidrains/DALLE-pytorch#195 (a cut file)."""
    good = encoded(Image.new("RGB", (32, 32), (9, 99, 199)), "JPEG")
    bomb = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, name, data in (
            ("0", "jpg", good), ("1", "jpg", good[: len(good) // 2]), ("2", "png", bytes(bomb)), ("3", "jpg", good)
        ):  # fmt: skip
            for extension, content in ((name, data), ("txt", b"a square")):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    found = scan_shard(lambda at, count: data[at : at + count], len(data), "0.tar", check="decode")
    assert len(found.spans) == 4 and [item.key for item in found.damage] == ["1", "2"]
    assert found.damage_counts == {"bad_image": 2} and "too large" in found.damage[1].detail


@pytest.mark.parametrize("source", ["txt", "json:caption"])
def test_a_byte_order_mark_is_no_part_of_a_caption(source: str) -> None:
    """WangRongsheng/MedQA-ChatGLM#2, ultrajson/ultrajson#640: editors on Windows write one, json.loads refuses it."""
    text = "a fox" if source == "txt" else '{"caption": "a fox"}'
    assert caption_of({source.split(":")[0]: text.encode("utf-8-sig")}, source) == "a fox"


def test_transparency_of_grey_and_palette_images_lies_over_white() -> None:
    """NVIDIA/DIGITS#85 and meerk40t/meerk40t#962: black where nothing was drawn, for LA and for a palette's entry."""
    grey = Image.new("LA", (8, 8), (0, 0))
    grey.putpixel((0, 0), (40, 255))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 40, 40, 40])
    palette.putpixel((0, 0), 1)
    for data in (
        encoded(grey, "PNG"),
        encoded(palette, "PNG", transparency=0),
        encoded(palette, "GIF", transparency=0),
    ):
        pixels = np.asarray(rgb_image(data))
        assert (pixels[0, 0] == 40).all() and (pixels[1:] == 255).all()


def test_ids_of_a_vocabulary_are_numbers_of_lines(tmp_path: Path) -> None:
    """OpenNMT/CTranslate2#1192 (lines that end in CR LF) and RunanywhereAI/runanywhere-sdks#479 (an empty line)."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "", "cat", "dog"]
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*words, ""]).encode())
    assert Tokenizer.load(tmp_path, 4).encode(["cat dog"])[0].tolist() == [2, 6, 7, 3]

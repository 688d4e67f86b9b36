"""Shards made to harm: `index` reports each damage by name, in little time and memory, and writes its own files alone."""

from __future__ import annotations

import gzip
import io
import json
import logging
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldmscale.cli import main
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.shards.report import check_shards

RECORD = b'{"caption": "x", "width": 48, "height": 40}'
Members = list[tuple[str, bytes | tarfile.TarInfo]]


def picture(format: str = "JPEG", **options: bytes) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def sample(key: str, image: bytes | None = None, extension: str = "jpg", json: bytes = RECORD) -> Members:
    image = picture() if image is None else image
    return [(f"{key}.{extension}", image), (f"{key}.txt", b"a thing"), (f"{key}.json", json)]


def tar(members: Members, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tuple[str, tarfile.TarInfo]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


def of_size(field: bytes) -> bytes:
    """A tar whose first header gives this size."""
    whole = tar(sample("a") + sample("b"), tarfile.USTAR_FORMAT)
    return checksummed(whole[:124] + field + whole[136:512]) + whole[512:]


def of_pax(record: bytes) -> bytes:
    """A tar with a pax header of its own before the first member."""
    whole = tar(sample("a") + sample("ok"), tarfile.USTAR_FORMAT)
    header = whole[:124] + b"%011o\0" % len(record) + whole[136:156] + b"x" + whole[157:512]
    return checksummed(header) + record.ljust(-(-len(record) // 512) * 512, b"\0") + whole


def of_pax_size(value: bytes) -> bytes:
    body = b" size=" + value + b"\n"
    length = len(body) + len(str(len(body) + 3))
    return of_pax(str(length).encode() + body)


def checksummed(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a thousandth of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height // 1000 * (1 + width // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


LINKS = [special("a.jpg", tarfile.SYMTYPE), special("b.jpg", tarfile.LNKTYPE)]
DEVICES = [
    special("c.jpg", tarfile.CHRTYPE),
    special("d.jpg", tarfile.BLKTYPE),
    special("e.jpg", tarfile.FIFOTYPE),
]
THROUGH = [special("in", tarfile.SYMTYPE, "../../../.."), *sample("in/ESCAPED")]
GHOST = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%touch ESCAPED) (w) file\n"
DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'

# The archive; kinds of damage with their counts; samples that are found.
MANY = {"empty_member": 100_000, "missing_member": 200_000}
DEEP, DIGITS = b'{"caption":' * 900 + b"1" + b"}" * 900, b'{"caption": "x", "width": ' + b"9" * 5000 + b"}"
TARS: dict[str, tuple[Callable[[], bytes], dict[str, int], int]] = {
    "..": (lambda: tar(sample("../../../../ESCAPED") + sample("ok")), {"unsafe_name": 3}, 1),
    "absolute": (lambda: tar(sample("/etc/ESCAPED") + sample("ok")), {"unsafe_name": 3}, 1),
    "backslashes": (lambda: tar(sample("..\\..\\ESCAPED") + sample("C:\\ESCAPED") + sample("ok")), {"unsafe_name": 6}, 1),
    "links": (lambda: tar([*LINKS, *sample("ok")]), {"special_member": 2}, 1),
    "devices": (lambda: tar([*DEVICES, *sample("ok")]), {"special_member": 3}, 1),
    "through a link": (lambda: tar([*THROUGH, *sample("ok")]), {"special_member": 1}, 2),
    "escape in a key": (lambda: tar(sample("\x1b[2Jk", b"none") + sample("ok")), {"bad_image": 1}, 2),
    "NUL in a key": (lambda: tar(sample("a\0b", b"none") + sample("ok")), {"unsafe_name": 3}, 1),
    "long key": (lambda: tar(sample("k" * 60_000, b"none") + sample("ok")), {"bad_image": 1}, 2),
    "10^5 members": (lambda: tar([(f"{i:07d}.txt", b"") for i in range(100_000)], tarfile.USTAR_FORMAT), MANY, 100_000),
    "size beyond the file": (lambda: of_size(b"77777777777\0"), {"truncated": 1, "empty_shard": 1}, 0),
    "negative size": (lambda: of_size(b"\xff" * 12), {"truncated": 1, "empty_shard": 1}, 0),
    "size of 2^88": (lambda: of_size(b"\x80" + b"\x7f" * 11), {"truncated": 1, "empty_shard": 1}, 0),
    "pax size of 300 digits": (lambda: of_pax_size(b"9" * 300), {"truncated": 1, "empty_shard": 1}, 0),
    "negative pax size": (lambda: of_pax_size(b"-5"), {}, 2),
    "pax length beyond": (lambda: of_pax(b"9999999999999999999 a=b\n"), {}, 2),
    "pax length of 0": (lambda: of_pax(b"0 a=b\n" * 100), {}, 2),
    "pax path that leaves": (lambda: of_pax(b"30 path=../../../../ESCAPED.jpg\n"), {"unsafe_name": 1, "missing_member": 1}, 2),
    "twice": (lambda: tar(sample("a") + sample("a") + sample("ok")), {"duplicate_member": 3}, 2),
    "gzip of zeros": (lambda: gzip.compress(bytes(10**7)), {"corrupt_header": 1, "empty_shard": 1}, 0),
    "zeros": (lambda: bytes(10240), {"empty_shard": 1}, 0),
    "noise": (lambda: np.random.default_rng(0).bytes(100_000), {"corrupt_header": 1, "empty_shard": 1}, 0),
    "image of 3.6 Gpx": (lambda: tar(sample("a", png_of(60_000, 60_000), "png") + sample("ok")), {"bad_image": 1}, 2),
    "truncated PNG": (lambda: tar(sample("a", picture("PNG")[:300], "png") + sample("ok")), {"bad_image": 1}, 2),
    "truncated WebP": (lambda: tar(sample("a", picture("WEBP")[:60], "webp") + sample("ok")), {"bad_image": 1}, 2),
    "SVG": (lambda: tar(sample("a", DRAWING, "png") + sample("ok")), {"bad_image": 1}, 2),
    "PostScript": (lambda: tar(sample("a", GHOST) + sample("ok")), {"bad_image": 1}, 2),
    "TIFF": (lambda: tar(sample("a", picture("TIFF")) + sample("ok")), {"bad_image": 1}, 2),
    "huge EXIF": (lambda: tar(sample("a", picture(exif=b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 60_000)) + sample("ok")), {}, 2),
    "nested json": (lambda: tar(sample("a", json=b"[" * 200_000) + sample("ok")), {"bad_caption": 1}, 2),
    "nested and whole json": (lambda: tar(sample("a", json=DEEP) + sample("ok")), {"bad_caption": 1}, 2),
    "number of 5000 digits": (lambda: tar(sample("a", json=DIGITS) + sample("ok")), {"bad_caption": 1}, 2),
    "infinite numbers": (lambda: tar(sample("a", json=b'{"caption": "x", "width": 1e999, "height": NaN}') + sample("ok")), {}, 2),
    "200,000 equal keys": (lambda: tar(sample("a", json=b"{" + b'"a": 1,' * 200_000 + b'"caption": "x"}') + sample("ok")), {}, 2),
    "half a surrogate pair": (lambda: tar(sample("a", json=b'{"caption": "\\ud83d"}') + sample("ok")), {"bad_caption": 1}, 2),
    "json in UTF-16": (lambda: tar(sample("a", json=RECORD.decode().encode("utf-16")) + sample("ok")), {"bad_caption": 1}, 2),
}  # fmt: skip


@contextmanager
def little(seconds: float, nbytes: int) -> Iterator[None]:
    """Fails where the block takes more time of the processor, or more memory beyond what is there."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + nbytes, before[1]))
    began = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - began < seconds


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("name", TARS)
def test_index_reports_the_damage_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make, damage, samples = TARS[name]
    folder = tmp_path / "a" / "b" / "c" / "d"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    shard = folder / "00000.tar"
    shard.write_bytes(make())
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with little(10.0, 1 << 30):
            status = main(["index", f"data.shards={shard}", "data.check=decode", "data.caption=json:caption"])
    finally:
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
        root.setLevel(level)
        logging.captureWarnings(False)
    report, told = capfd.readouterr()
    found = json.loads(report)
    assert found["damage_counts"] == damage and found["samples"] == samples
    assert status == (2 if damage else 0)
    assert "Traceback" not in told and len(told) < 100_000
    assert not any("ESCAPED" in path for path in files(tmp_path)) and not Path("/etc/ESCAPED.jpg").exists()
    written = files(tmp_path) - {"a/b/c/d/00000.tar"}
    assert written and all(path.startswith(("a/b/c/d/.ldmscale_index/", "cache/")) for path in written)


def test_a_reader_takes_no_member_that_leaves_the_folder(tmp_path: Path) -> None:
    shard = tmp_path / "set" / "00000.tar"
    shard.parent.mkdir()
    shard.write_bytes(tar([*THROUGH, *sample("../ESCAPED"), *LINKS, *sample("ok")]))
    index = ShardIndex.build([str(shard)])
    assert index is not None and index.total == 2
    reader = SampleReader(index)
    assert [sorted(reader.read(0, number).members) for number in range(2)] == [["jpg", "json", "txt"]] * 2
    reader.close()
    assert not any("ESCAPED" in path for path in files(tmp_path))


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no samples": lambda record: record.pop("samples"),
    "negative": lambda record: record.update(samples=-1),
    "text for a number": lambda record: record.update(size="1"),
    "no check": lambda record: record.update(check="all"),
    "damage of numbers": lambda record: record.update(damage=[{"key": 1, "kind": 2, "detail": 3}]),
    "statistics of text": lambda record: record["statistics"].update(captions="many"),
    "nested": lambda record: record.update(statistics=json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_an_index_of_others_that_makes_no_sense_is_made_anew(
    forge: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    shard = str(tmp_path / "00000.tar")
    Path(shard).write_bytes(tar(sample("a") + sample("b")))
    whole = check_shards([shard]).to_json()
    (index,) = tmp_path.rglob("00000.tar.idx")
    line, _, spans = index.read_bytes().partition(b"\n")
    record = json.loads(line)
    forge(record)
    index.write_bytes(json.dumps(record).encode() + b"\n" + spans)
    assert check_shards([shard]).to_json() == whole  # looked through again
    assert index.read_bytes() == line + b"\n" + spans
    index.write_bytes(b"[" * 200_000 + b"\n" + spans)
    assert check_shards([shard]).to_json() == whole

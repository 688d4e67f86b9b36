"""The index finds every sample, names all damage, is incremental and atomic, and refuses shards that
changed."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.shards.report import check_shards
from ldmscale.data.shards.scan import SPAN
from ldmscale.data.shards.urls import expand
from ldmscale.errors import DataError

CHECKOUT = Path(__file__).resolve().parents[3]
WriteShards = Callable[..., list[str]]
WriteTar = Callable[..., str]
MakeImage = Callable[..., bytes]


def test_every_sample_is_found_and_read(tmp_path: Path, write_shards: WriteShards) -> None:
    shards = write_shards(tmp_path, [3, 1, 4])
    index = ShardIndex.build(shards)
    assert index is not None and index.counts.tolist() == [3, 1, 4] and index.total == 8
    reader = SampleReader(index)
    for shard, path in enumerate(shards):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        read = [reader.read(shard, number) for number in range(int(index.counts[shard]))]
        assert {f"{s.key}.{extension}": data for s in read for extension, data in s.members.items()} == files
        assert {sample.shard for sample in read} == {path}


def test_a_sample_takes_twelve_bytes_and_the_spans_are_mapped(
    tmp_path: Path, write_shards: WriteShards
) -> None:
    assert SPAN.itemsize == 12
    index = ShardIndex.build(write_shards(tmp_path, [2, 2]))
    assert index is not None and isinstance(index._spans, np.memmap)
    again = pickle.loads(pickle.dumps(index))
    assert isinstance(again._spans, np.memmap) and again.span(1, 1) == index.span(1, 1)
    with pytest.raises(IndexError, match="no number 2"):
        index.span(0, 2)


def test_extensions_are_lower_cased_and_other_files_left_out(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(
        tmp_path / "a.tar", [("README", b"r"), ("./k/1.JPG", b"j"), ("./k/1.Txt", b"t"), ("._2.jpg", b"m")]
    )
    index = ShardIndex.build([path])
    assert index is not None and index.total == 1
    sample = SampleReader(index).read(0, 0)
    assert sample.key == "k/1" and sample.members == {"jpg": b"j", "txt": b"t"}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_with_long_names_are_read_from_the_middle(
    tmp_path: Path, write_tar: WriteTar, format: int
) -> None:
    names = [f"{'long' * 40}{number}" for number in range(3)]
    members = [(f"{name}.{end}", f"{name}{end}".encode()) for name in names for end in ("jpg", "txt")]
    index = ShardIndex.build([write_tar(tmp_path / "a.tar", members, format=format)])
    assert index is not None
    reader = SampleReader(index)
    for number in (2, 0, 1):
        sample = reader.read(0, number)
        assert sample.key == names[number] and sample.members["txt"] == f"{names[number]}txt".encode()


def test_a_shard_that_is_not_indexed_or_missing_is_refused_with_the_remedy(
    tmp_path: Path, write_shards: WriteShards
) -> None:
    shards = write_shards(tmp_path, [2, 2])
    with pytest.raises(DataError) as caught:
        ShardIndex.open(shards)
    assert len(caught.value.faults) == 2 and f"ldmscale index data.shards={shards[0]}" in str(caught.value)
    with pytest.raises(DataError, match=r"no\.tar cannot be found"):
        ShardIndex.open([*shards, str(tmp_path / "no.tar")])
    assert ShardIndex.open(shards, build_missing=True).total == 4


@pytest.mark.parametrize("merged_before", [True, False])
def test_a_changed_shard_is_refused_and_rebuilt(
    tmp_path: Path, write_shards: WriteShards, merged_before: bool
) -> None:
    shards = write_shards(tmp_path, [2, 2])
    check_shards(shards)
    if merged_before:
        ShardIndex.open(shards)
    write_shards(tmp_path, [2, 3])
    os.utime(shards[1], ns=(1, 1))
    os.utime(shards[0], ns=(10**18, 10**18))
    for build_missing in (False, True):
        with pytest.raises(DataError, match="changed since it was indexed") as caught:
            ShardIndex.open(shards, build_missing=build_missing)
        assert f"ldmscale index data.shards={shards[1]}" in str(caught.value)
    index = ShardIndex.build(shards)
    assert index is not None and index.counts.tolist() == [2, 3]


def test_a_shard_that_changes_under_the_reader_is_noticed(tmp_path: Path, write_shards: WriteShards) -> None:
    shards = write_shards(tmp_path, [3])
    index = ShardIndex.build(shards)
    assert index is not None
    with open(shards[0], "r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(DataError, match=r"has 2000 bytes and had \d+ when it was indexed"):
        SampleReader(index).read(0, 0)


def test_only_new_shards_are_looked_through(tmp_path: Path, write_shards: WriteShards) -> None:
    first = write_shards(tmp_path, [2, 2])
    assert check_shards(first).looked_through == 2
    every = write_shards(tmp_path / "more", [1]) + first
    report = check_shards(every)
    assert (report.looked_through, report.shards, report.samples) == (1, 3, 5)
    assert check_shards(every, "spans").looked_through == 0
    assert check_shards(every, "decode").looked_through == 3  # looks more closely than before
    assert check_shards(every, "headers").looked_through == 0
    assert check_shards(every, "headers", caption_source="json:alt").looked_through == 3


def test_ranks_share_the_work(tmp_path: Path, write_shards: WriteShards) -> None:
    shards = write_shards(tmp_path, [1, 2, 3, 4, 5])
    parts = [check_shards(shards, rank=rank, world=3) for rank in range(3)]
    assert [part.samples for part in parts] == [1 + 4, 2 + 5, 3]
    whole = check_shards(shards)
    assert (whole.looked_through, whole.samples) == (0, 15)
    assert ShardIndex.open(shards).total == 15


def test_many_may_build_at_once(tmp_path: Path, write_shards: WriteShards) -> None:
    shards = write_shards(tmp_path, [4] * 6)
    totals: list[int] = []

    def build() -> None:
        totals.append(ShardIndex.open(shards, build_missing=True).total)

    threads = [threading.Thread(target=build, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert totals == [24] * 6
    assert not list((tmp_path / ".ldmscale_index").glob("*.part"))


def test_the_cache_takes_the_index_of_a_folder_that_cannot_be_written(
    tmp_path: Path, cache: Path, write_shards: WriteShards
) -> None:
    shards = write_shards(tmp_path / "set", [2])
    (tmp_path / "set" / ".ldmscale_index").write_text("a file in the way stops root, too")
    ShardIndex.build(shards)
    assert list(cache.glob("index/*/00000.tar.idx")) and ShardIndex.open(shards).total == 2


def test_shards_of_a_remote_store_are_indexed_and_read(
    tmp_path: Path, cache: Path, write_shards: WriteShards
) -> None:
    store = fsspec.filesystem("memory")
    for path in write_shards(tmp_path, [3, 2]):
        store.pipe_file(f"/index/{os.path.basename(path)}", Path(path).read_bytes())
    shards = expand("memory://index/{00000..00001}.tar")
    index = ShardIndex.build(shards, check="decode")
    assert index is not None and index.counts.tolist() == [3, 2] and list(cache.glob("index/*/00000.tar.idx"))
    local = ShardIndex.build([str(tmp_path / "00000.tar"), str(tmp_path / "00001.tar")])
    assert local is not None
    for shard, number in [(0, 2), (1, 0)]:
        assert (
            SampleReader(index).read(shard, number).members == SampleReader(local).read(shard, number).members
        )
    store.pipe_file("/index/00001.tar", b"other")
    with pytest.raises(DataError, match="changed since"):
        ShardIndex.open(shards)


def test_the_fingerprint_knows_the_set_and_not_its_place(tmp_path: Path, write_shards: WriteShards) -> None:
    prints = []
    for folder, counts in [("a", [2, 3]), ("b", [2, 3]), ("c", [3, 2])]:
        index = ShardIndex.build(write_shards(tmp_path / folder, counts))
        assert index is not None
        prints.append(index.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_statistics_add_up(tmp_path: Path, write_tar: WriteTar, make_image: MakeImage) -> None:
    members = []
    for number, (width, height) in enumerate([(40, 30), (100, 70), (200, 300)]):
        members += [(f"{number}.png", make_image(width, height)), (f"{number}.txt", b"word " * (number + 1))]
    one = write_tar(tmp_path / "a.tar", members[:2])
    two = write_tar(tmp_path / "b.tar", members[2:])
    for _ in range(2):  # the second time from the records
        record = check_shards([one, two]).to_json()
        assert record["captions"] == {"count": 3, "words_p5": 1, "words_p50": 2, "words_p95": 3}
        assert record["images"]["smallest"] == (40, 30) and record["images"]["largest"] == (200, 300)
        assert (record["images"]["short_side_p5"], record["images"]["short_side_p95"]) == (0, 192)
    json.dumps(record)


def _fifteen_faults(folder: Path, write_tar: WriteTar, image: MakeImage) -> dict[tuple[str, str], str]:
    """Plants faults; returns {(shard, key): kind}."""
    good = [("good.png", image()), ("good.txt", b"a caption")]
    jpeg = image(300, 200, format="JPEG")
    huge = bytearray(image(8, 8))
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    # The checksum of the header chunk is behind it; a decoder that looked at it would refuse the image for
    # that.
    huge[29:33] = __import__("zlib").crc32(bytes(huge[12:29])).to_bytes(4, "big")
    write_tar(folder / "00.tar", good)
    write_tar(
        folder / "01.tar",
        [
            *good,
            ("no_caption.png", image()),
            ("no_image.txt", b"text"),
            ("empty.png", b""),
            ("empty.txt", b"text"),
            ("cut.jpg", jpeg[: len(jpeg) // 2]),
            ("cut.txt", b"text"),
            ("latin.png", image()),
            ("latin.txt", "caf\xe9".encode("latin-1")),
            ("blank.png", image()),
            ("blank.txt", b" \n"),
            ("huge.png", bytes(huge)),
            ("huge.txt", b"text"),
            ("text.jpg", b"<html>503</html>"),
            ("text.txt", b"text"),
            ("named.jpg", image()),
            ("named.txt", b"text"),
            ("../evil.png", image()),
        ],
    )
    whole = Path(
        write_tar(folder / "02.tar", [*good, ("cut.png", image(64, 64)), ("cut.txt", b"text")])
    ).read_bytes()
    (folder / "02.tar").write_bytes(whole[: 2 * 512 + 2000 + 3000])
    flipped = bytearray(
        Path(write_tar(folder / "03.tar", [*good, *((f"{n}.png", image()) for n in range(3))])).read_bytes()
    )
    flipped[flipped.rindex(b"1.png") + 110] ^= 1
    (folder / "03.tar").write_bytes(bytes(flipped))
    with tarfile.open(folder / "04.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in good:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    write_tar(
        folder / "05.tar", [("a.png", image()), ("b.png", image()), ("a.txt", b"text"), ("b.txt", b"text")]
    )
    (folder / "06.tar").write_bytes(b"not found" * 300)
    write_tar(folder / "07.tar", [])
    return {
        ("01.tar", "no_caption"): "missing_member",
        ("01.tar", "no_image"): "missing_member",
        ("01.tar", "empty"): "empty_member",
        ("01.tar", "cut"): "bad_image",
        ("01.tar", "latin"): "bad_caption",
        ("01.tar", "blank"): "bad_caption",
        ("01.tar", "huge"): "bad_image",
        ("01.tar", "text"): "bad_image",
        ("01.tar", "named"): "wrong_extension",
        ("01.tar", "../evil.png"): "unsafe_name",
        ("02.tar", ""): "truncated",
        ("03.tar", ""): "corrupt_header",
        ("04.tar", "link.png"): "special_member",
        ("05.tar", "a"): "scattered_sample",
        ("06.tar", ""): "corrupt_header",
        ("07.tar", ""): "empty_shard",
        ("08.tar", ""): "missing_shard",
    }


def test_every_planted_fault_is_named(tmp_path: Path, write_tar: WriteTar, make_image: MakeImage) -> None:
    planted = _fifteen_faults(tmp_path, write_tar, make_image)
    shards = [str(tmp_path / f"{number:02d}.tar") for number in range(9)]
    for _ in range(2):  # afresh, and from the records
        report = check_shards(shards, "decode")
        named = {(os.path.basename(item.shard), item.key, item.kind) for item in report.damage}
        assert {(shard, key, kind) for (shard, key), kind in planted.items()} <= named
        assert not [item for item in report.damage if item.key == "good" or item.shard.endswith("00.tar")]
        assert report.damaged == len(report.damage) and all(item.detail for item in report.damage)
    quick = {(item.key, item.kind) for item in check_shards(shards[1:2], "headers").damage}
    json.dumps(report.to_json())
    # check=headers reads no pixels: of the faults above it misses the half image only.
    (tmp_path / "fresh").mkdir()
    os.link(shards[1], tmp_path / "fresh" / "01.tar")
    fresh = {
        (item.key, item.kind) for item in check_shards([str(tmp_path / "fresh" / "01.tar")], "headers").damage
    }
    assert quick - fresh == {("cut", "bad_image")}


def test_a_damaged_shard_gives_its_readable_samples(
    tmp_path: Path, write_tar: WriteTar, make_image: MakeImage
) -> None:
    _fifteen_faults(tmp_path, write_tar, make_image)
    index = ShardIndex.open([str(tmp_path / f"{number:02d}.tar") for number in (2, 3)], build_missing=True)
    assert index.counts.tolist() == [1, 2]
    assert SampleReader(index).read(0, 0).key == "good"
    with pytest.raises(DataError, match="hold no sample"):
        ShardIndex.open([str(tmp_path / "07.tar")], build_missing=True)
    with pytest.raises(DataError, match="missing_shard"):
        ShardIndex.build([str(tmp_path / "08.tar")])


def test_two_members_of_one_name_are_reported_in_words_that_can_be_printed(
    tmp_path: Path, write_tar: WriteTar, make_image: MakeImage
) -> None:
    image = make_image(format="JPEG")
    path = write_tar(tmp_path / "a.tar", [("0001.jpg", image), ("0001.jpg", image)])
    done = subprocess.run(
        [sys.executable, "-m", "ldmscale", "index", f"data.shards={path}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    printed = done.stdout + done.stderr
    assert f"missing_member: {path} 0001: no .txt for the caption (members: jpg)" in printed
    assert f"duplicate_member: {path} 0001: two members end with .jpg; the first counts" in printed
    assert "\0" not in printed
    # The span of the sample holds both members.
    index = ShardIndex.build([path])
    assert index is not None and index.total == 1
    assert SampleReader(index).read(0, 0).members == {"jpg": image}


def test_an_index_that_names_other_shards_than_the_user_is_refused(
    tmp_path: Path, write_shards: WriteShards
) -> None:
    shards = write_shards(tmp_path / "mine", [2, 2])
    (tmp_path / "secret").write_bytes(b"of another" * 1000)
    index = ShardIndex.build(shards)
    assert index is not None
    line, _, spans = index.path.read_bytes().partition(b"\n")
    header = json.loads(line)
    for names in ([shards[0], str(tmp_path / "secret")], shards[::-1], shards[:1]):
        index.path.write_bytes(json.dumps({**header, "urls": names}).encode() + b"\n" + spans)
        with pytest.raises(DataError, match=r"names other shards than data\.shards|1 shards have 2 counts"):
            ShardIndex.open(shards)
    index.path.write_bytes(line + b"\n" + spans)
    assert ShardIndex.open(shards).shards == shards

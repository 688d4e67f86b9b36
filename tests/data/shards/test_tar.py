"""Our tar headers are those that Python's tarfile sees; a damaged archive is told at the damaged place."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ldmscale.data.shards.tar import TarFault, members, plain_members, split_name

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMES = st.text(alphabet="abÄ字/. -_", min_size=1, max_size=150).filter(
    lambda name: name.strip("/. ") and "//" not in name and name[-1] != "/"
)


def _archive(files: list[tuple[str, bytes]], format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _members(data: bytes) -> list[tuple[str, bytes, str]]:
    found = members(lambda offset, count: data[offset : offset + count], len(data))
    return [(member.name, data[member.data : member.data + member.size], member.refused) for member in found]


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6),
    format=st.sampled_from(FORMATS[1:]),
)
def test_names_and_bytes_are_those_of_tarfile(files: list[tuple[str, bytes]], format: int) -> None:
    data = _archive(files, format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        wanted = [(entry.name, tar.extractfile(entry).read()) for entry in tar.getmembers()]  # type: ignore[union-attr]
    assert [(name, content) for name, content, _ in _members(data)] == wanted


@settings(max_examples=150, deadline=None)
@given(
    files=st.lists(st.tuples(NAMES, st.binary(max_size=700)), min_size=1, max_size=4),
    format=st.sampled_from(FORMATS[1:]),
    harm=st.lists(st.tuples(st.integers(0, 4 * 1536), st.integers(0, 255)), max_size=2),
    cut=st.integers(0, 3000),
)
@example(files=[("_", b""), ("_", b"\x01")], format=tarfile.GNU_FORMAT, harm=[(512 + 154, 1)], cut=1)
@example(files=[("_", b"")], format=tarfile.USTAR_FORMAT, harm=[(154, 1)], cut=1)
def test_the_fast_way_says_what_the_careful_way_says_or_nothing(
    files: list[tuple[str, bytes]], format: int, harm: list[tuple[int, int]], cut: int
) -> None:
    span = bytearray(_archive(files, format).rstrip(b"\0"))
    for place, value in harm:
        span[place % len(span)] = value
    data = bytes(span[: len(span) - cut // 4] if cut % 4 == 0 else span)
    found = plain_members(data)
    try:
        wanted = _members(data + bytes(-len(data) % 512 + 1024))
    except TarFault:
        assert found is None
        return
    if found is not None:
        assert [(name, content, "") for name, content in found] == wanted


def test_plain_spans_go_the_fast_way() -> None:
    files = [("0001.jpg", b"x" * 900), ("0001.txt", "ü".encode()), ("a/0001.json", b"{}")]
    data = _archive(files, tarfile.USTAR_FORMAT)[: 512 * 7]
    assert plain_members(data) == files
    for unsafe in ("/0001.jpg", "../0001.jpg", "C:0001.jpg", "a\\0001.jpg"):
        assert plain_members(_archive([(unsafe, b"x")], tarfile.USTAR_FORMAT)[:1024]) is None


@pytest.mark.parametrize("format", FORMATS)
def test_long_names_of_every_format_are_read(format: int) -> None:
    name = f"{'folder' * 12}/{'file' * 20}.jpg"
    assert _members(_archive([(name, b"x"), ("short.txt", b"y")], format)) == [
        (name, b"x", ""),
        ("short.txt", b"y", ""),
    ]


def test_every_cut_is_noticed_and_whole_members_before_it_are_given() -> None:
    data = _archive([("a.txt", b"1" * 600), ("b.txt", b"2" * 600)], tarfile.USTAR_FORMAT)
    whole = 2 * (512 + 1024)
    for cut in range(0, whole + 1, 128):
        found = members(lambda offset, count, cut=cut: data[:cut][offset : offset + count], cut)
        got = []
        with pytest.raises(TarFault) as caught:
            got.extend(found)
        assert caught.value.kind in ("truncated", "no_end_mark")
        # The bytes of a member end before its padding does.
        assert len(got) == (cut >= 512 + 600) + (cut >= 1536 + 512 + 600)


def test_flipped_header_bits_are_noticed() -> None:
    data = bytearray(_archive([("a.txt", b"1"), ("b.txt", b"2")], tarfile.USTAR_FORMAT))
    data[1024 + 3] ^= 4
    with pytest.raises(TarFault, match="byte 1024 has a wrong checksum"):
        _members(bytes(data))


def test_gzip_and_other_files_are_told() -> None:
    with pytest.raises(TarFault, match="gzip"):
        _members(b"\x1f\x8b" + bytes(range(256)) * 4)
    with pytest.raises(TarFault, match="no tar archive"):
        _members(b"PK\x03\x04" + b"hello world " * 100)


def test_archives_joined_by_cat_are_read_whole() -> None:
    """libarchive#1620: real writers pad to 10 KiB, and `cat a.tar b.tar` is two archives, whatever lies between."""
    first = _archive([("a.txt", b"one")], tarfile.USTAR_FORMAT)
    second = _archive([("b.txt", b"two"), ("c.txt", b"3" * 3000)], tarfile.PAX_FORMAT)
    wanted = [("a.txt", b"one", ""), ("b.txt", b"two", ""), ("c.txt", b"3" * 3000, "")]
    for joined in (first + second, first + bytes(700 * 512) + second, first[: 512 * 4] + second):
        assert _members(joined) == wanted
    assert _members(first + second + first) == [*wanted, wanted[0]]


def test_a_header_that_became_zeros_is_no_end() -> None:
    one = _archive([("a.txt", b""), ("b.txt", b""), ("c.txt", b"3")], tarfile.USTAR_FORMAT)
    with pytest.raises(TarFault, match="zeros in place of the header at byte 512") as caught:
        _members(one[:512] + bytes(512) + one[1024:])
    assert caught.value.kind == "corrupt_header"


@pytest.mark.parametrize("gap", [0, 512, 4096, 9728, 300_000])
def test_data_behind_the_end_that_are_no_archive_are_named(gap: int) -> None:
    data = _archive([("a.txt", b"one")], tarfile.USTAR_FORMAT) + bytes(gap) + b"<html>gone</html>" * 40
    with pytest.raises(TarFault, match="no tar archive") as caught:
        _members(data)
    assert caught.value.kind == "data_after_end"


def test_members_stored_sparse_are_named(tmp_path: Path) -> None:
    """The four formats of `tar -S`: each member once, under its own name."""
    for name in ("0.bmp", "1.txt"):
        with open(tmp_path / name, "wb") as file:
            file.seek(1 << 20 if name == "0.bmp" else 0)
            file.write(b"x" * 512)
    for options in (
        ["--format=gnu"],
        *(["--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")),
    ):
        command = ["tar", "--sparse", "--hole-detection=raw", *options, "-cf", "s.tar", "0.bmp", "1.txt"]
        subprocess.run(command, cwd=tmp_path, check=True)
        (name, _, refused), plain = _members((tmp_path / "s.tar").read_bytes())
        assert name == "0.bmp" and "sparse" in refused and plain == ("1.txt", b"x" * 512, "")


def test_a_nul_in_a_name_is_named() -> None:
    """C programs cut such a name, and the sample is gone without a report."""
    data = bytearray(_archive([("a.txt", b"one")], tarfile.USTAR_FORMAT))
    data[0:9] = b"a\0b.txt\0\0"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    ((name, _, refused),) = _members(bytes(data))
    assert name == "a\0b.txt" and "NUL" in refused and plain_members(bytes(data[:1024])) is None


def test_a_copy_that_was_never_finished_is_told() -> None:
    one = _archive([("a.txt", b"1"), ("b.txt", b"2" * 5000)], tarfile.USTAR_FORMAT)
    assert len(_members(one + bytes(100_000))) == 2
    reserved = one[:1024] + bytes(2_000_000)
    with pytest.raises(TarFault, match=r"2000000 bytes from byte 1024 on are empty") as caught:
        _members(reserved)
    assert caught.value.kind == "truncated"


def test_links_devices_and_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [
            ("l.txt", tarfile.SYMTYPE),
            ("h.txt", tarfile.LNKTYPE),
            ("d.txt", tarfile.CHRTYPE),
        ]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        for name in ("/etc/x.txt", "../x.txt", "a/../../x.txt", "C:\\x.txt", "good..name.txt", "./a/b.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert [bool(refused) for _, _, refused in _members(path.read_bytes())] == [True] * 7 + [False] * 2


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.jpg", ("a", "jpg")),
        ("./a/b.JPG", ("a/b", "jpg")),
        ("v1.0/a.latent.npy", ("v1.0/a", "latent.npy")),
        ("README", None),
        ("a/.hidden", None),
        ("._a.jpg", None),
        ("a.", None),
    ],
)
def test_names_split_at_the_first_dot_as_webdataset_does(name: str, split: tuple[str, str] | None) -> None:
    assert split_name(name) == split

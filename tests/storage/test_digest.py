"""Digests: their values are in checkpoints, manifests and names of files, so they must stay."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import xxhash

from ldmscale.storage.digest import file_sha256, file_xxh3, folder_sha256, listing_sha256, sha256


def test_digests_of_contents_are_the_published_functions(tmp_path: Path) -> None:
    content = os.urandom((1 << 22) + 5)  # more than one chunk
    (tmp_path / "b").write_bytes(content)
    assert file_sha256(tmp_path / "b") == sha256(content) == hashlib.sha256(content).hexdigest()
    assert sha256("ü") == hashlib.sha256("ü".encode()).hexdigest()
    assert file_xxh3(tmp_path / "b") == xxhash.xxh3_128(content).hexdigest()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c").write_bytes(b"c")
    assert folder_sha256(tmp_path) == hashlib.sha256(b"a/c\0c" + b"b\0" + content).hexdigest()


def test_the_digest_of_a_listing_changes_with_names_sizes_and_times_only(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"1234")
    before = listing_sha256(tmp_path, without="samples")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "0.png").write_bytes(b"")
    status = file.stat()
    file.write_bytes(b"5678")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert listing_sha256(tmp_path, without="samples") == before
    file.write_bytes(b"56789")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert listing_sha256(tmp_path, without="samples") != before
    assert listing_sha256(file, without="samples") == listing_sha256(tmp_path, without="samples")

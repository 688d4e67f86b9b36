"""Digests of files, bytes and folders. SHA-256 where a digest is published or compared with others', xxh3 for checkpoints.

Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

_CHUNK = 1 << 22  # bytes


@dataclass(frozen=True)
class FileRecord:
    """A written file: name in its folder, size in bytes, xxh3_128 of the content in hexadecimal digits."""

    name: str
    size: int
    xxh3_128: str


def sha256(content: bytes | str) -> str:
    """SHA-256 of bytes, or of a text in UTF-8: 64 hexadecimal digits."""
    return hashlib.sha256(
        content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    ).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits. `~` stands for the home folder."""
    state = hashlib.sha256()
    for chunk in _chunks(Path(path).expanduser()):
        state.update(chunk)
    return state.hexdigest()


def folder_sha256(folder: Path) -> str:
    """SHA-256 of all files below a folder: of their names and contents, in the order of their paths."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(file.relative_to(folder)).encode() + b"\0")
        for chunk in _chunks(file):
            total.update(chunk)
    return total.hexdigest()


def listing_sha256(path: Path, *, without: str) -> str:
    """SHA-256 of the names, sizes and modification times of a file, or of the files below a folder.

    For models of many large files. Files in folders called `without` do not count.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    listed: list[tuple[Any, ...]] = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if without not in file.relative_to(path).parts
    ]
    return sha256(repr(listed))


def file_xxh3(path: Path) -> str:
    """xxh3_128 of a file's content, 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    for chunk in _chunks(path):
        state.update(chunk)
    return state.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk

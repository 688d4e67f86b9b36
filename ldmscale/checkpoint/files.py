"""What keeps files honest: fsync, moves that happen whole or not at all, sizes and hashes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

_HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """A written file: name in its folder, size in bytes, xxh3_128 of the content in hexadecimal digits."""

    name: str
    size: int
    xxh3_128: str


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one move: a reader finds the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """xxh3_128 of a file's content, 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            state.update(chunk)
    return state.hexdigest()

"""Files that a user gives, and why one cannot be read: one message for each cause, with the caller's remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldmscale.errors import DataError, LdmscaleError
from ldmscale.storage.plain_values import parsed_object

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins so is a pointer of Git LFS, which a clone without Git LFS has in place of a large file."""
    return head.startswith(_LFS_POINTER)


def lfs_fault(path: Path | str) -> str:
    """What such a file is, and what brings the file itself."""
    return f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"


def refuse_lfs_pointer(path: Path, kind: type[LdmscaleError] = DataError) -> None:
    """Raises `kind` where a file is a pointer of Git LFS. Other causes are the reader's."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS_POINTER))
    except OSError:
        return
    if is_lfs_pointer(head):
        raise kind(lfs_fault(path))


def lines_of(text: str) -> list[str]:
    """Lines as files have them: they end at LF or CR LF. `str.splitlines` also cuts at U+2028, U+0085 and form feeds."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_given(path: Path, remedy: str, kind: type[LdmscaleError] = DataError) -> bytes:
    """The bytes of a file. Raises `kind` where there are none to read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "it is a folder" if path.is_dir() else error.strerror or str(error)
        raise kind(f"{path} cannot be read ({reason}): {remedy}") from error
    if is_lfs_pointer(data):
        raise kind(lfs_fault(path))
    return data


def read_given_text(path: Path, remedy: str, kind: type[LdmscaleError] = DataError) -> str:
    """The text of a file in UTF-8, with a byte order mark or without. Raises `kind` where it is none."""
    data = read_given(path, remedy, kind)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(
            f"{path} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}): {remedy}"
        ) from error


def read_given_object(path: Path, remedy: str, kind: type[LdmscaleError] = DataError) -> dict[str, Any]:
    """The JSON object of a file. Raises `kind` where it is none."""
    text = read_given_text(path, remedy, kind)
    try:
        return parsed_object(text)
    except ValueError as error:
        raise kind(f"{path} holds no JSON object ({error}): {remedy}") from error

"""Where this room keeps files of its own, and how it writes them: whole or not at all."""

from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ldmscale.errors import ConfigError


def cache_folder(name: str) -> Path:
    """Returns `~/.cache/ldmscale/NAME`, or NAME below $LDMSCALE_CACHE or $XDG_CACHE_HOME/ldmscale.

    The folder is not made here: whoever writes into it does that.
    """
    own = os.environ.get("LDMSCALE_CACHE")
    if own:
        return Path(own).expanduser() / name
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "ldmscale" / name


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it when the block ends without an error.

    Readers never see half a file, and several processes may write the same one: the last whole file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, parts: bytes | Iterable[bytes]) -> None:
    """Writes `path` atomically from bytes or from a series of them."""
    with finished_file(path) as temporary, open(temporary, "wb") as stream:
        for part in [parts] if isinstance(parts, bytes) else parts:
            stream.write(part)


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


@contextmanager
def appearing(dst: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `dst` when the block ends well, and vanishes when it does not.

    Raises ConfigError where `dst` is there with other content and `overwrite` is false, and where overwriting would
    remove files that the result does not have.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if not dst.exists():
            os.replace(temporary, dst)
        elif not _same(temporary, dst):
            _replace(temporary, dst, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, dst: Path, overwrite: bool) -> None:
    if not overwrite:
        raise ConfigError(
            f"dst={dst} is there already, with other content: give another dst, or overwrite=true"
        )
    if not dst.is_dir():
        raise ConfigError(f"dst={dst} is a file, and the result is a folder: give another dst")
    if others := sorted(_files(dst) - _files(temporary)):
        raise ConfigError(
            f"dst={dst} holds files that the result does not have ({', '.join(others[:5])}): they would be lost; give another dst"
        )
    aside = dst.with_name(f".{dst.name}.{os.getpid()}.replaced")
    os.replace(dst, aside)
    os.replace(temporary, dst)
    shutil.rmtree(aside)


def appearing_file(dst: Path, overwrite: bool, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path in dst's folder (same ending), then rename to `dst`. Refuses like `appearing`."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    folder = dst.with_name(f".{dst.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        write(folder / dst.name)
        if dst.exists() and filecmp.cmp(folder / dst.name, dst, shallow=False):
            return
        if dst.exists() and not overwrite:
            raise ConfigError(
                f"dst={dst} is there already, with other content: give another dst, or overwrite=true"
            )
        os.replace(folder / dst.name, dst)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def _same(one: Path, other: Path) -> bool:
    if not other.is_dir() or _files(one) != _files(other):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in _files(one))

"""Atomic writes of files and folders, exclusive creation, renames and locks on file systems.

A reader finds the old content or the new content, never a part of it. Content is written under a temporary name in
the same folder (`.NAME.<random>.part`), which no other process uses, and then renamed. A new file has the permissions
that the umask leaves, as after `open`. Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ldmscale.errors import ConfigError
from ldmscale.waiting import Wait

# What fsync of a folder raises on file systems that have no such operation.
_LONGEST_LOCK_SECONDS = 6 * 3600.0  # what a lock covers, such as a download, takes less
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)


def cache_folder(name: str) -> Path:
    """Returns `~/.cache/ldmscale/NAME`, or NAME below $LDMSCALE_CACHE or $XDG_CACHE_HOME/ldmscale.

    The folder is not created here.
    """
    own = os.environ.get("LDMSCALE_CACHE")
    if own:
        return Path(own).expanduser() / name
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "ldmscale" / name


def open_new(folder: Path, prefix: str) -> tuple[Path, BinaryIO]:
    """Creates a file PREFIX<random>.part in `folder` and returns its path and a stream to write into."""
    path = folder / f"{prefix}{secrets.token_hex(6)}.part"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    return path, os.fdopen(handle, "wb")


@contextmanager
def finished_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path` and renames it to `path` when the block ends without an error.

    Several processes may write the same path: the last complete file stays.

    Args:
        path: the file to create or replace. Its folder is created.
        durable: wait until content and name are on the disk. False for files that a crash of the machine may lose.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, stream = open_new(path.parent, f".{path.name}.")
    stream.close()
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, parts: bytes | Iterable[bytes], *, durable: bool = True) -> None:
    """Writes `path` atomically from bytes or from a series of them."""
    with finished_file(path, durable=durable) as temporary, open(temporary, "wb") as stream:
        for part in [parts] if isinstance(parts, bytes) else parts:
            stream.write(part)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Writes `path` atomically as UTF-8."""
    write_file(path, text.encode("utf-8"), durable=durable)


def write_json(path: Path, value: Any, *, indent: int | None = 2, durable: bool = True) -> None:
    """Writes `path` atomically as JSON with a newline at the end."""
    write_text(path, json.dumps(value, indent=indent) + "\n", durable=durable)


def create_file(path: Path, content: bytes) -> bool:
    """Creates `path` with this content unless it exists. Returns whether this call created it.

    Of several processes that create the same path exactly one gets True, on network file systems too. The file appears
    complete; only on a file system without hard links may a reader find a part of it.
    """
    draft, stream = open_new(path.parent, f".{path.name}.")
    try:
        with stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            # A server whose answer got lost is asked twice, and refuses the second request.
            with suppress(OSError):
                return os.path.samefile(draft, path)
            return False
        except OSError:  # no hard links on this file system
            try:
                with open(path, "xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        return True
    finally:
        draft.unlink(missing_ok=True)


def move(old: Path, new: Path) -> None:
    """Renames a file or folder within a file system. Replaces a file, or an empty folder, that has the new name."""
    os.replace(old, new)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` during the block. Other processes of this node wait for it, 6 hours at most.

    The kernel frees it when its holder ends, however that happens.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        wait = Wait(f"another process of this node, which holds {path}", limit_seconds=_LONGEST_LOCK_SECONDS)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait.turn(0.1)
        yield


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """Yields an empty temporary folder in the folder of `dst`. It is removed at the end, unless it was renamed."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = dst.with_name(f".{dst.name}.{secrets.token_hex(6)}.part")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def appearing(dst: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `dst` when the block ends without an error and is removed otherwise.

    Raises:
        ConfigError: `dst` exists with other content and `overwrite` is false, or overwriting would remove files that
            the result does not have.
    """
    with new_folder(dst) as temporary:
        yield temporary
        if not dst.exists():
            os.replace(temporary, dst)
        elif not _same(temporary, dst):
            _replace(temporary, dst, overwrite)


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
    replace_folder(temporary, dst)


def replace_folder(temporary: Path, dst: Path) -> None:
    """Renames the folder `temporary` to `dst`. A folder that is there is renamed first and then removed."""
    aside = dst.with_name(f"{temporary.name}.replaced")
    with suppress(FileNotFoundError):
        os.replace(dst, aside)
    os.replace(temporary, dst)
    shutil.rmtree(aside, ignore_errors=True)


def appearing_file(dst: Path, overwrite: bool, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path of dst's name in a temporary folder, then renames it to `dst`.

    Raises:
        ConfigError: as `appearing`.
    """
    with new_folder(dst) as folder:
        write(folder / dst.name)
        if dst.exists() and filecmp.cmp(folder / dst.name, dst, shallow=False):
            return
        if dst.exists() and not overwrite:
            raise ConfigError(
                f"dst={dst} is there already, with other content: give another dst, or overwrite=true"
            )
        os.replace(folder / dst.name, dst)


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def _same(one: Path, other: Path) -> bool:
    if not other.is_dir() or _files(one) != _files(other):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in _files(one))

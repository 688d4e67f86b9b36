"""Where this room keeps files of its own, and how it writes them: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


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

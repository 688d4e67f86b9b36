"""Names of shards: brace patterns, globs and lists become a list of URLs, and URLs become sizes and versions.

`pipe:` URLs run a shell command, so they are refused unless the user allows them. An allowed command is run by
`run_pipes`, once on each node, into the cache; its exit status counts, and the copy is read like any local shard (an
index needs random access, a pipe has none).
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import braceexpand

from ldmscale.errors import DataError, StoppedEarlyError
from ldmscale.storage.atomic import cache_folder, finished_file, locked
from ldmscale.storage.digest import sha256
from ldmscale.storage.object_store import (
    AccessError,
    ShardState,
    Storage,
    StoreError,
    StoreTimeoutError,
    state_of,
)
from ldmscale.waiting import finished, is_stoppable, make_stoppable, stop_reason

log = logging.getLogger(__name__)

_LISTED_FAULTS = 6
_LOOK_FOR_STOP_SECONDS = 0.5


def expand(
    patterns: str | Sequence[str],
    *,
    allow_pipe: bool = False,
    storage: Storage | None = None,
    absent: bool = False,
) -> list[str]:
    """Expands patterns to the list of shards, in the order given (matches of a glob are sorted).

    Args:
        patterns: one pattern or several: `shards/{00000..00041}.tar`, `shards/*.tar`, a plain path, or any of
            these as an fsspec URL (`s3://bucket/{000..999}.tar`). A folder stands for the tar files in it.
        allow_pipe: let `pipe:COMMAND` stand; nothing is run here (see `run_pipes`).
        storage: how stores are reached that must list what a pattern matches.
        absent: let local files stand that are not there, for an index to name with all else that is damaged.

    Raises:
        DataError: with every fault: no match, file missing (local files only; remote ones are looked up by
            the index), no backend for a URL, a shard named twice, `pipe:` without leave, nothing given.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    faults: list[str] = []
    found: list[str] = []
    if not given or not any(pattern.strip() for pattern in given):
        raise DataError(
            "data.shards names no shard; give a pattern such as data.shards='shards/{00000..00009}.tar'"
        )
    for pattern in given:
        for name in _braces(pattern, faults):
            found.extend(_matches(name, allow_pipe, storage or Storage(), absent, faults))
    # A backend that is not there is one fault, not one of each shard.
    for url in {url.split("://", 1)[0]: url for url in found if not is_local(url)}.values():
        try:
            (storage or Storage()).locate(url)
        except DataError as error:
            faults += error.faults
    seen: set[str] = set()
    for url in found:
        if url in seen:
            faults.append(f"shard {url} is named twice in data.shards; every shard may be named once")
        seen.add(url)
    if faults:
        more = len(faults) - _LISTED_FAULTS
        raise DataError(
            [*faults[:_LISTED_FAULTS], *([f"... and {more} more faults in data.shards"] if more > 0 else [])]
        )
    return found


def _braces(pattern: str, faults: list[str]) -> list[str]:
    if pattern.startswith("pipe:"):
        return [pattern]  # braces are the shell's
    if is_local(pattern) and os.path.exists(local_path(pattern)):
        return [pattern]  # a path that exists is a path, whatever is in its name
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        faults.append(
            f"data.shards pattern {pattern!r} has unbalanced braces ({error}); write for example "
            f"{{00000..00009}}"
        )
        return []


def _matches(name: str, allow_pipe: bool, storage: Storage, absent: bool, faults: list[str]) -> list[str]:
    if name.startswith("pipe:"):
        if not allow_pipe:
            faults.append(
                f"{name!r} would run a shell command; set data.allow_pipe=true if you trust it, or use an "
                "s3:// or http URL"
            )
            return []
        return [name]
    if is_local(name):
        path = local_path(name)
        if os.path.isdir(path):
            matches = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
            if not matches:
                faults.append(f"folder {path} has no .tar file; data.shards must name WebDataset shards")
            return matches
        if glob.has_magic(path) and not os.path.exists(path):
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                faults.append(
                    f"pattern {path} matches no file; check the folder, or quote the pattern so that the "
                    "shell leaves it alone"
                )
            return matches
        if not absent and not os.path.exists(path):
            faults.append(f"shard {path} does not exist; check data.shards")
            return []
        return [path]
    if glob.has_magic(name.split("://", 1)[-1].split("?", 1)[0]) and not name.startswith(
        ("http://", "https://")
    ):
        try:
            fs, path = storage.locate(name)
            found = storage.persist(lambda: fs.glob(path), name)
            matches = sorted(fs.unstrip_protocol(match) for match in found)
        except DataError as error:
            faults.append(f"cannot list {name}: {error}")
            return []
        if not matches:
            faults.append(f"pattern {name} matches no object")
        return matches
    return [name]


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://", "pipe:"))


def local_path(url: str) -> str:
    """Returns the absolute path of a local shard, whatever way it was written; of a pipe that of its copy."""
    if url.startswith("pipe:"):
        return str(_pipe_copy(url))
    path = url.split("://", 1)[1] if "://" in url else url
    return os.path.abspath(os.path.expanduser(path))


def shard_name(url: str) -> str:
    """The last part of a shard's path: `00012.tar`."""
    if url.startswith("pipe:"):
        return _pipe_copy(url).name
    return url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]


def run_pipes(urls: Sequence[str]) -> None:
    """Runs the commands of `pipe:` URLs whose copies are not in the cache. Processes of one node may call it together.

    Raises:
        DataError: naming every command that ended with a status other than 0: its output may be cut, so none of
            it is used.
    """
    faults = []
    for url in urls:
        if url.startswith("pipe:"):
            path = _pipe_copy(url)
            with locked(path.with_suffix(".lock")):  # the others wait, and find it done
                if not path.exists():
                    faults += _run_pipe(url, path)
    if faults:
        raise DataError(faults)


def _pipe_copy(url: str) -> Path:
    command = url[len("pipe:") :]
    return cache_folder("pipes") / (sha256(command)[:24] + ".tar")


_LONGEST_PIPE_SECONDS = 6 * 3600.0


def _run_pipe(url: str, path: Path) -> list[str]:
    log.warning("running the shell command of %s", url)
    command = ["/bin/sh", "-c", url[len("pipe:") :]]
    if bash := shutil.which("bash"):
        # Of a pipeline `a | b` the status of every part counts, not only the last.
        command = [bash, "-o", "pipefail", "-c", url[len("pipe:") :]]
    try:
        with finished_file(path) as temporary, open(temporary, "wb") as stream:
            done = finished(
                command, cause=f"the command of {url}", limit_seconds=_LONGEST_PIPE_SECONDS, stdout=stream
            )
            if done.returncode != 0:
                last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
                raise DataError(
                    f"{url!r} ended with status {done.returncode} ({last[0]}); its output was thrown away"
                )
    except DataError as error:
        return [str(error)]
    return []


def shard_states(urls: Sequence[str], storage: Storage | None = None) -> list[ShardState | str]:
    """Looks every shard up; a shard that cannot be found gives the reason as a string instead.

    Remote shards are looked up by one listing a folder where the store can list, otherwise one by one in 16
    threads.
    """
    store = storage or Storage()
    states: list[ShardState | str] = [_local_state(url) if is_local(url) else "" for url in urls]
    remote = [number for number, url in enumerate(urls) if not is_local(url)]
    if remote:
        folders = sorted({urls[number].rsplit("/", 1)[0] for number in remote})
        listings = {folder: _listing(folder, store) for folder in folders}

        def look_up(number: int) -> ShardState | str:
            url = urls[number]
            known = listings[url.rsplit("/", 1)[0]].get(shard_name(url))
            return known if known is not None else _remote_state(url, store)

        for number, state in _in_threads(look_up, remote):
            states[number] = state
    return states


def _in_threads(
    work: Callable[[int], ShardState | str], numbers: Sequence[int]
) -> Iterator[tuple[int, ShardState | str]]:
    """Numbers and what `work` returns for them, as they come, from 16 threads.

    Raises the first error of a thread, and StoppedEarlyError after a stop request. The threads do not keep a process alive that
    is to end: each may wait for its store for as long as `data.storage.patience_seconds`.
    """
    tasks: SimpleQueue[int] = SimpleQueue()
    found: SimpleQueue[tuple[int, ShardState | str | BaseException]] = SimpleQueue()
    for number in numbers:
        tasks.put(number)
    stops = is_stoppable()

    def run() -> None:
        if stops:
            make_stoppable()
        while True:
            try:
                number = tasks.get_nowait()
            except Empty:
                return
            try:
                found.put((number, work(number)))
            except BaseException as error:  # raised where the result is taken
                found.put((number, error))

    for _ in range(min(16, len(numbers))):
        Thread(target=run, name="shards", daemon=True).start()
    for _ in numbers:
        number, result = _next(found)
        if isinstance(result, BaseException):
            raise result
        yield number, result


def _next(
    found: SimpleQueue[tuple[int, ShardState | str | BaseException]],
) -> tuple[int, ShardState | str | BaseException]:
    while True:
        try:
            return found.get(timeout=_LOOK_FOR_STOP_SECONDS)
        except Empty:
            if (reason := stop_reason()) is not None:
                raise StoppedEarlyError(
                    f"stopped by {reason} while shards were looked up", shared=False
                ) from None


def _local_state(url: str) -> ShardState | str:
    try:
        status = os.stat(local_path(url))
    except OSError as error:
        return f"{error.strerror or error}"
    return ShardState(status.st_size, str(status.st_mtime_ns))


def _listing(folder: str, storage: Storage) -> dict[str, ShardState]:
    if folder.startswith(("http://", "https://")):
        return {}
    try:
        found = storage.listing(folder)
    except (AccessError, StoreTimeoutError):
        return {}  # no right to list, or too many objects in the folder: each shard is looked up on its own
    except StoreError:
        raise  # it was waited for long enough
    except DataError:  # an absent folder
        return {}
    return {shard_name(entry["name"]): state_of(entry) for entry in found if entry["type"] == "file"}


def _remote_state(url: str, storage: Storage) -> ShardState | str:
    try:
        return state_of(storage.info(url))
    except StoreError:
        raise
    except DataError as error:
        return str(error)

"""The client of object stores, on fsspec: its options, and requests that survive transient faults of a network.

A request is retried, with waits that double, until it succeeds or the patience of the configuration is used up.
Each try has a time limit, too: a stalled connection costs one try, not the run. Permanent faults (no such object, no
access) are not retried. URLs of local files work as well; they get no options.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.exceptions import FSTimeoutError

from ldmscale.errors import DataError, StoppedEarlyError
from ldmscale.storage.atomic import create_file
from ldmscale.waiting import Wait, WaitTimeoutError, announced, is_stoppable

log = logging.getLogger(__name__)

_FIRST_WAIT = 0.25  # seconds; doubles with each try
_LONGEST_WAIT = 15.0
_CREDENTIALS = (
    "check its credentials (each backend's own environment variables and files, or data.storage.options) and "
    "data.storage.endpoint"
)
_LOOK_SECONDS = 0.5  # between two looks at the stop request while the store answers
_STOP_GRACE_SECONDS = 2.0  # a request that ends so soon after a stop request still counts
_LISTING_TRIES = 3.0  # a listing of a large folder may take as long as so many reads

T = TypeVar("T")


class StoreError(DataError):
    """A store that cannot be reached or refuses us. No sample's own fault: another one in its place would hide it."""


class AccessError(StoreError):
    """A store that answers, and refuses us."""


class StoreTimeoutError(StoreError):
    """The last try did not end within its time limit."""


class AbsentError(DataError):
    """There is no such object."""


class Short(Exception):
    """Fewer bytes came than were asked for."""


@dataclass(frozen=True)
class Storage:
    """How remote shards are reached. A value: it travels to workers.

    Attributes:
        options: of fsspec's filesystem of any remote shard (`{"anon": true}`, `{"key": ..., "secret": ...}`).
        endpoint: URL of an S3- or GCS-compatible store, in place of the public one.
        patience_seconds: a read that has not succeeded after so long ends the run.
        request_seconds: limit of one try.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    endpoint: str | None = None
    patience_seconds: float = 120.0
    request_seconds: float = 20.0

    def locate(self, url: str) -> tuple[Any, str]:
        """Returns (filesystem, path in it) of a remote URL.

        Raises:
            DataError: if the backend's package is not installed.
        """
        protocol = url.split("://", 1)[0] if "://" in url else "file"
        try:
            return fsspec.core.url_to_fs(url, **self._options_of(protocol))  # type: ignore[no-any-return]
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{url} cannot be read: {error}; s3 needs `pip install ldmscale[s3]`, gs `pip install ldmscale[gs]`, "
                "http(s) `pip install aiohttp`"
            ) from error

    def read(self, url: str, start: int, end: int) -> bytes:
        """Returns bytes [start, end) of an object.

        Raises:
            DataError: if there is no such object.
            StoreError: if the store refuses access, or patience ran out.
        """
        fs, path = self.locate(url)

        def once() -> bytes:
            data = bytes(self.bounded(fs, "cat_file", path, start=start, end=end))
            if len(data) != end - start:
                raise Short(f"{len(data)} of {end - start} bytes came")
            return data

        return self.persist(once, f"{url} at byte {start}")

    def info(self, url: str) -> dict[str, Any]:
        """What the store says of an object: size, ETag ... Raises as `read`."""
        fs, path = self.locate(url)
        found: dict[str, Any] = self.persist(lambda: self.bounded(fs, "info", path), url)
        return found

    def content(self, url: str) -> bytes:
        """All bytes of a small object. Raises as `read`, and AbsentError where there is none."""
        return bytes(self.ask("cat_file", url))

    def ask(self, method: str, url: str, *arguments: Any, tries: float = 1.0, **options: Any) -> Any:
        """What a method of the filesystem says of an object; `tries`: how many tries' time it may take. Raises as `read`."""
        fs, path = self.locate(url)
        return self.persist(lambda: self.bounded(fs, method, path, *arguments, tries=tries, **options), url)

    def create(self, url: str, content: bytes) -> bool:
        """Creates an object unless it exists. Returns whether `content` is what it holds then.

        S3 (`If-None-Match`), Google's store (generation 0) and local files refuse the second writer. For others the
        object is read back, so contents must differ between writers. Raises as `read`.
        """
        fs, path = self.locate(url)
        if "file" in _protocols(fs):
            return self.persist(lambda: create_file(Path(path), content), url)

        def once() -> bool:
            refused: Exception | None = None
            try:
                self.bounded(fs, "pipe_file", path, content, mode="create")
            except Exception as error:  # each store's library reports an existing object in its own way
                refused = error
            try:
                # The answer to a request that succeeded may have been lost.
                found = bytes(self.bounded(fs, "cat_file", path))
            except FileNotFoundError:
                if refused is not None:
                    raise refused from None
                return False
            return found == content

        return self.persist(once, url)

    def listing(self, folder: str) -> list[dict[str, Any]]:
        """What lies in a folder. Raises as `read`."""
        fs, path = self.locate(folder)

        def once() -> list[dict[str, Any]]:
            fs.invalidate_cache()
            return list(self.bounded(fs, "ls", path, tries=_LISTING_TRIES, detail=True))

        return self.persist(once, folder)

    def persist(self, work: Callable[[], T], what: str) -> T:
        """Runs `work` until it succeeds, with waits between, for `patience_seconds` at most."""
        deadline = time.monotonic() + self.patience_seconds
        wait, tries, reason = _FIRST_WAIT, 0, ""
        waiting = Wait(
            lambda: f"{what} ({reason})",
            limit_seconds=math.inf,  # the deadline ends it
            obeys_stop=is_stoppable(),
            grace_seconds=_STOP_GRACE_SECONDS,
        )
        while True:
            tries += 1
            try:
                return work()
            except FileNotFoundError as error:
                if not _passing(error.__cause__):
                    raise AbsentError(f"{what}: there is no such object (any more)") from error
                failure: BaseException = error.__cause__ or error
            except PermissionError as error:
                raise AccessError(f"{what}: the store refuses access ({error}); {_CREDENTIALS}") from error
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                raise StoreError(f"{what}: {error}; give another path or URL") from error
            except (DataError, StoppedEarlyError):
                raise
            except Exception as error:  # every backend raises its own kinds
                failure = error
            reason = f"{type(failure).__name__}: {failure}".rstrip(": ")
            left = deadline - time.monotonic()
            if left <= 0:
                # Tried again all the same: the service that hands out a machine's keys has bad days as well.
                remedy = (
                    _CREDENTIALS
                    if "Credentials" in reason
                    else "look at the store and the network" + _proxy_hint(what)
                )
                kind = StoreTimeoutError if isinstance(failure, FSTimeoutError) else StoreError
                raise kind(
                    f"{what}: no success in {self.patience_seconds:g} s and {tries} tries (last: {reason}); {remedy}, and "
                    "start the same command again; data.storage.patience_seconds is how long a run waits"
                ) from failure
            # Ranks that failed together must not come back together.
            pause = min(wait, left) * (0.5 + random.random() / 2)
            log.warning("%s: %s; trying again in %.1f s", what, reason, pause)
            waiting.turn(pause)
            wait = min(2 * wait, _LONGEST_WAIT)

    def bounded(self, fs: Any, name: str, *arguments: Any, tries: float = 1.0, **options: Any) -> Any:
        """One try of a method of a filesystem, for as long as so many tries may take."""
        where = f"the store's answer about {arguments[0] if arguments else fs}"
        if not isinstance(fs, AsyncFileSystem):
            with announced(where):
                return getattr(fs, name)(*arguments, **options)
        seconds = self.request_seconds * tries
        answer = asyncio.run_coroutine_threadsafe(getattr(fs, f"_{name}")(*arguments, **options), fs.loop)
        waiting = Wait(
            where, limit_seconds=seconds, obeys_stop=is_stoppable(), grace_seconds=_STOP_GRACE_SECONDS
        )
        try:
            while True:
                try:
                    return answer.result(timeout=min(_LOOK_SECONDS, seconds))
                except (TimeoutError, FutureTimeoutError):
                    if answer.done():
                        raise
                waiting.check()
        except WaitTimeoutError as error:
            raise FSTimeoutError from error
        finally:
            answer.cancel()

    def _options_of(self, protocol: str) -> dict[str, Any]:
        if protocol in ("file", "local"):
            return {}
        given = dict(self.options)
        if protocol in ("s3", "s3a"):
            # botocore's own tries would multiply with ours; its connections are kept and need a limit.
            own = {"retries": {"max_attempts": 2, "mode": "standard"}, "connect_timeout": 5}
            own["read_timeout"] = max(1, round(self.request_seconds))
            given["config_kwargs"] = {**own, **given.get("config_kwargs", {})}
            if self.endpoint is not None:
                given["endpoint_url"] = self.endpoint
        elif protocol in ("gs", "gcs") and self.endpoint is not None:
            given["endpoint_url"] = self.endpoint
        elif protocol in ("http", "https"):
            # aiohttp obeys http_proxy, https_proxy and no_proxy only where it is asked to; curl and pip always do.
            given["client_kwargs"] = {"trust_env": True, **given.get("client_kwargs", {})}
        return given


def _passing(cause: BaseException | None) -> bool:
    """Is it the network's doing? fsspec calls a file of a web server absent whatever went wrong, and keeps the cause."""
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    network = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return network and not isinstance(cause, FileNotFoundError)


def _proxy_hint(url: str) -> str:
    """Which variable of a proxy a request to a web server goes by; empty where it goes by none."""
    parts = urlsplit(url.split()[0])
    proxies = urllib.request.getproxies_environment()
    if parts.scheme not in ("http", "https"):
        return ""
    if parts.scheme in proxies and not urllib.request.proxy_bypass(parts.hostname or ""):
        return (
            f" (the request goes through the proxy of {parts.scheme}_proxy; no_proxy={parts.hostname} or "
            "data.storage.options={client_kwargs: {trust_env: false}} goes past it)"
        )
    return f" ({parts.scheme}_proxy is not set: export it where only a proxy reaches the world)"


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@dataclass(frozen=True)
class ShardState:
    """Tells one version of a shard from another: bytes, and the ETag (remote) or the mtime in ns (local)."""

    size: int
    version: str


def state_of(entry: dict[str, Any]) -> ShardState:
    version = (
        entry.get("ETag")
        or entry.get("etag")
        or entry.get("LastModified")
        or entry.get("Last-Modified")
        or entry.get("mtime")
        or entry.get("created")
    )
    return ShardState(int(entry.get("size") or 0), str(version or "").strip('"'))

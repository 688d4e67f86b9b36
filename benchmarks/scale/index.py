"""The index of S shards on a local disk: making it, opening it again, and the file calls of a rank's look-up at a start."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.memory import resident_mib
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.urls import expand

_EVENTS = ("open", "os.listdir", "os.scandir")  # audit events; stat has none


@dataclass(frozen=True)
class Indexed:
    shards: int
    samples: int
    make_seconds: float  # the first open, which reads every shard
    make_cpu_seconds: float
    open_seconds: float  # expand the pattern and open the index that is there: every rank at every start
    stats: int  # calls of stat and lstat, at that
    opens: int  # of files, at that
    listings: int  # of folders, at that
    index_bytes: int  # of all files that the index consists of
    memory_mib: float  # that the first open added


def write_shards(folder: Path, shards: int, samples: int, image_bytes: int = 200) -> int:
    """Writes equal shards 00000.tar, ... of samples with jpg, json and txt, and returns the bytes of one."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            members = {
                "jpg": os.urandom(image_bytes),
                "json": b'{"width": 256, "height": 256}',
                "txt": b"a caption of some words",
            }
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = buffer.getvalue()
    for number in range(shards):
        (folder / f"{number:05d}.tar").write_bytes(data)
    return len(data)


def measure(shards: int, samples: int = 2) -> Indexed:
    """Shards of `samples` samples each in a temporary folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(folder, shards, samples)
        pattern = f"{folder}/{{00000..{shards - 1:05d}}}.tar"
        before, begin, cpu = resident_mib(), time.perf_counter(), time.process_time()
        ShardIndex.open(expand(pattern), build_missing=True)
        made, made_cpu = time.perf_counter() - begin, time.process_time() - cpu
        added = resident_mib() - before
        begin = time.perf_counter()
        with _file_calls() as calls:
            index = ShardIndex.open(expand(pattern))
        opened = time.perf_counter() - begin
        files = [path for path in (folder / ".ldmscale_index").rglob("*") if path.is_file()]
        return Indexed(
            shards=shards,
            samples=index.total,
            make_seconds=made,
            make_cpu_seconds=made_cpu,
            open_seconds=opened,
            stats=calls["stat"] + calls["lstat"],
            opens=calls["open"],
            listings=calls["os.listdir"] + calls["os.scandir"],
            index_bytes=sum(path.stat().st_size for path in files),
            memory_mib=added,
        )


@contextmanager
def _file_calls() -> Iterator[Counter[str]]:
    """Counts Python's file calls within. An audit hook cannot be removed: it is idle afterwards."""
    calls: Counter[str] = Counter()
    active = True

    def hook(event: str, _: object) -> None:
        if active and event in _EVENTS:
            calls[event] += 1

    def counting(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*args, **options)

        return call

    sys.addaudithook(hook)
    real = {name: getattr(os, name) for name in ("stat", "lstat")}
    for name, function in real.items():
        setattr(os, name, counting(name, function))
    try:
        yield calls
    finally:
        active = False
        for name, function in real.items():
            setattr(os, name, function)

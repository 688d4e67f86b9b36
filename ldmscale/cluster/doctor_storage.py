"""Disk and store before a run: is the folder writable and fast, is there room, are the shards there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ldmscale.cluster.doctor_run import Findings
from ldmscale.data.shards.urls import is_local, local_path
from ldmscale.errors import DataError
from ldmscale.storage.object_store import Storage

_BYTES_PER_PARAMETER = 16  # fp32 master, two Adam states, one average
_READ_BYTES = 16 * 2**20


def examine_folder(folder: Path, measure_mib: int) -> Findings:
    """Write, read and delete a file in `folder`, which is made if it is missing."""
    found = Findings()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written, read = _disk_rates(folder, measure_mib)
    except OSError as error:
        found.faults.append(
            f"{folder} cannot be written ({error.strerror or error}): give another doctor.folder or run.dir"
        )
        return found
    found.values["disk"] = (
        f"{folder}: {written:.0f} MiB/s written and on the disk, {read:.0f} MiB/s read back"
    )
    return found


def examine_room(folder: Path, parameters: int, keep: int) -> Findings:
    """Is there room for `keep` checkpoints of `parameters`, and the one that is being written?"""
    found = Findings()
    one = parameters * _BYTES_PER_PARAMETER
    need, free = one * (keep + 1), shutil.disk_usage(folder).free
    found.values["room"] = (
        f"{free / 2**30:.1f} GiB free; a checkpoint of {parameters:,} parameters takes {one / 2**30:.1f} GiB, {keep} and the "
        f"next one {need / 2**30:.1f}"
    )
    if need > free:
        found.faults.append(
            f"{folder} has {free / 2**30:.1f} GiB free and {need / 2**30:.1f} are needed: free some, or give another run.dir"
        )
    return found


def examine_shards(shards: Sequence[str], probes: int, storage: Storage) -> Findings:
    """Open evenly chosen shards and read the beginning of each."""
    found = Findings()
    count = min(probes, len(shards))
    chosen = [shards[number * (len(shards) - 1) // max(1, count - 1)] for number in range(count)]
    amount, began = 0, time.perf_counter()
    for url in dict.fromkeys(chosen):
        try:
            head = _beginning(url, storage)
        except OSError as error:
            found.faults.append(f"{url} cannot be read: {error.strerror or error}")
            continue
        except DataError as error:
            found.faults.append(f"{url} cannot be read: {error}")
            continue
        amount += len(head)
        if not head:
            found.faults.append(f"{url} is empty")
    seconds = time.perf_counter() - began
    found.values["shards"] = (
        f"{len(shards)}, of which {len(set(chosen))} were opened: {amount / 2**20 / seconds:.0f} MiB/s"
    )
    return found


def _beginning(url: str, storage: Storage) -> bytes:
    if is_local(url):
        with open(local_path(url), "rb") as file:
            return file.read(_READ_BYTES)
    return storage.read(url, 0, min(_READ_BYTES, int(storage.info(url).get("size") or 0)))


def _disk_rates(folder: Path, measure_mib: int) -> tuple[float, float]:
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        began = time.perf_counter()
        for _ in range(measure_mib):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = measure_mib / (time.perf_counter() - began)
        # Not from the page cache, where the system lets us ask for that.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(2**20):
            pass
        return written, measure_mib / (time.perf_counter() - began)

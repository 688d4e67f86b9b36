"""The manifest of a checkpoint that N ranks wrote: what rank 0 does at each save, and every rank at each start.

Tensors are not written, only their descriptions: the ranges that each rank holds follow from the rules of the engines.
"""

from __future__ import annotations

import gc
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.pretended_cuda import experiment
from benchmarks.scale.memory import peak_mib
from ldmscale.builders.networks import build_denoiser
from ldmscale.checkpoint import manifest as manifests
from ldmscale.storage.digest import FileRecord, file_xxh3

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
Shapes = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Saved:
    """One save by `ranks` ranks, and one start from it. Seconds are processor time of one thread; sizes are exact."""

    zero_stage: int
    ranks: int
    tensors: int
    parameters: int
    pieces: int  # ranges over all ranks and kinds
    descriptions_mb: float  # files that rank 0 reads
    manifest_mb: float
    read_seconds: float  # rank 0 reads the descriptions,
    merge_seconds: float  # merges them,
    write_seconds: float  # and writes the manifest
    longest_stall_ms: float  # of a busy thread beside that, which holds the GIL in turn
    open_seconds: float  # every rank at a start: hash and read the manifest
    find_seconds: float  # and find its own range of every tensor
    peak_mib: float  # of this process, which is rank 0 and a reader


def shapes(overrides: Sequence[str] = ()) -> Shapes:
    """Names and shapes of the parameters of the 1.45B model, with `overrides`."""
    with torch.device("meta"):
        network = build_denoiser(experiment.diffusion(overrides))
    return [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]


def ranges(
    stage: int, rank: int, ranks: int, tensors: Shapes
) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape, offset and elements of each piece that a rank holds at ZeRO-`stage`.

    ZeRO-3 cuts each tensor into equal shares, rounded up; ZeRO-0 into equal slices, rounded down; ZeRO-1 and 2 cut the row of
    all tensors into equal shares.
    """
    total = sum(math.prod(shape) for _, shape in tensors)
    share = -(-total // ranks)
    start = 0
    for name, shape in tensors:
        numel = math.prod(shape)
        if stage == 3:
            own = -(-numel // ranks)
            low, high = min(own * rank, numel), min(own * (rank + 1), numel)
        elif stage == 0:
            low, high = numel * rank // ranks, numel * (rank + 1) // ranks
        else:
            low, high = max(share * rank - start, 0), min(share * (rank + 1) - start, numel)
        start += numel
        if high > low:
            yield name, shape, low, high - low


def measure(stage: int, ranks: int, tensors: Shapes, *, keep: Path | None = None) -> Saved:
    """Writes the descriptions of all ranks, merges them as rank 0, and opens the manifest as any rank.

    Args:
        keep: where the manifest stays afterwards; None: nowhere.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        records, pieces = [], 0
        for rank in range(ranks):
            described = {
                f"denoiser/{kind}/{name}": ("float32", shape, offset, numel)
                for kind in KINDS
                for name, shape, offset, numel in ranges(stage, rank, ranks, tensors)
            }
            pieces += len(described)
            # No tensors are written: a size that any share fits in.
            record = FileRecord(f"rank_{rank:05d}.safetensors", 1 << 40, "0" * 32)
            part = manifests.Part(rank, record, described)
            records.append(manifests.write_part(folder / f"rank_{rank:05d}.json", part))
        seconds: dict[str, float] = {}

        def commit() -> None:
            parts = _timed(
                seconds, "read", lambda: [manifests.read_part(folder / r.name, r) for r in records]
            )
            whole = _timed(seconds, "merge", lambda: manifests.merge(parts, step=1, state={"images_seen": 1}))
            _timed(seconds, "write", lambda: manifests.write_manifest(folder, whole))

        stall = _stall_beside(commit)
        path = folder / manifests.NAME
        begin = time.thread_time()
        file_xxh3(path)
        manifest = manifests.read_manifest(folder)
        opened = time.thread_time() - begin
        begin = time.thread_time()
        for key in manifest.keys:
            _own_shards(manifest, key, rank=ranks // 2)
        found = time.thread_time() - begin
        saved = Saved(
            zero_stage=stage,
            ranks=ranks,
            tensors=len(tensors),
            parameters=sum(math.prod(shape) for _, shape in tensors),
            pieces=pieces,
            descriptions_mb=sum(record.size for record in records) / 1e6,
            manifest_mb=path.stat().st_size / 1e6,
            read_seconds=seconds["read"],
            merge_seconds=seconds["merge"],
            write_seconds=seconds["write"],
            longest_stall_ms=stall,
            open_seconds=opened,
            find_seconds=found,
            peak_mib=peak_mib(),
        )
        if keep is not None:
            keep.write_bytes(path.read_bytes())
        return saved


def _own_shards(manifest: manifests.Manifest, key: str, rank: int) -> list[manifests.Shard]:
    """The shards of `key` that overlap with the share of `rank` at ZeRO-3, as `Reader.fill` finds them."""
    entry = manifest.keys[key]
    own = -(-entry.numel // manifest.world_size)
    low, high = min(own * rank, entry.numel), min(own * (rank + 1), entry.numel)
    return [s for s in entry.shards if max(s.offset, low) < min(s.offset + s.numel, high)]


def _timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    begin = time.thread_time()
    result = work()
    seconds[name] = time.thread_time() - begin
    return result


def _stall_beside(work: Callable[[], None]) -> float:
    """Runs `work` in a thread; returns the longest slice (ms) of Python work of this thread meanwhile, usually about 1 ms.

    The collector is off, as in training.
    """

    def slice_ms() -> float:
        begin = time.perf_counter()
        for _ in range(20_000):
            pass
        return (time.perf_counter() - begin) * 1e3

    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    gc.disable()
    try:
        worker = threading.Thread(target=run)
        longest = 0.0
        worker.start()
        while worker.is_alive():
            longest = max(longest, slice_ms())
        worker.join()
    finally:
        gc.enable()
    if failed:
        raise failed[0]
    return longest

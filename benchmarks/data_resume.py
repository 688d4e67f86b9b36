"""Time and memory from a cold process to the first batch of a resume at 90 % of a LAION-400M-sized index.

    python -m benchmarks.data_resume [--shards 41455] [--samples 10000] [--folder DIR]

The shards are hard links to one real tar of small samples, so that bytes that are read are real; the index is as large
as it would be (12 bytes a sample: 5 GB for 400 million). Prints seconds and MB of RSS on top of
the imports, and how long making the set's index from its records took. The order, the index and the reader are those
of a run; the first batch holds 64 samples.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

PROBE = """
import json, os, sys, time
import psutil
from ldmscale.data.loading.training_data import next_for_all
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.loading.loader import Loader
from ldmscale.data.shards.urls import expand

def item(sample, position):
    return {"caption": sample.members["txt"].decode()}

process = psutil.Process()
before, began = process.memory_info().rss, time.perf_counter()
index = ShardIndex.open(expand(sys.argv[1]))
opened = time.perf_counter() - began
loader = Loader(index, item, seed=0, rank=0, world=1, global_batch=64, rank_micro_batch=64,
                position=int(0.9 * index.total) // 64 * 64)
batch = next_for_all(loader)
assert len(batch["caption"]) == 64 and all(caption.startswith("caption") for caption in batch["caption"])
print(json.dumps({"samples": index.total, "seconds_to_open": round(opened, 3),
                  "seconds_to_first_batch": round(time.perf_counter() - began, 3),
                  "more_rss_mb": round((process.memory_info().rss - before) / 1e6, 1)}))
"""


def write_shard(path: Path, samples: int) -> None:
    """A tar of `samples` captions."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            data = f"caption {number}".encode()
            member = tarfile.TarInfo(f"{number:06d}.txt")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def prepare(folder: Path, shards: int, samples: int) -> float:
    """Makes shards and their records, then the set's index by the code of a run; returns the seconds of the latter."""
    from ldmscale.data.shards.index import ShardIndex
    from ldmscale.data.shards.records import FOLDER, find
    from ldmscale.data.shards.urls import expand

    first = folder / "000000.tar"
    write_shard(first, samples)
    ShardIndex.open([str(first)], build_missing=True)
    record = find(str(first), "000000.tar.idx")
    assert record is not None
    per_folder = 5000  # hard links to one file that a file system is sure to allow
    for number in range(1, shards):
        if number % per_folder == 0:
            first = folder / f"{number:06d}.tar"
            write_shard(first, samples)
            os.utime(first, ns=(0, (folder / "000000.tar").stat().st_mtime_ns))
        else:
            os.link(first, folder / f"{number:06d}.tar")
        os.link(record, folder / FOLDER / f"{number:06d}.tar.idx")
    began = time.perf_counter()
    ShardIndex.open(expand(str(folder / "*.tar")))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=41_455)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--quick", action="store_true", help="a small set: does it work?")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.shards, chosen.samples = 20, 100
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        folder = Path(scratch)
        merging = prepare(folder, chosen.shards, chosen.samples)
        runs = []
        for _ in range(1 if chosen.quick else 3):
            done = subprocess.run(
                [sys.executable, "-c", PROBE, str(folder / "*.tar")],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            runs.append(json.loads(done.stdout))
    best = min(runs, key=lambda run: run["seconds_to_first_batch"])
    worst = max(run["more_rss_mb"] for run in runs)
    rows = {**best, "more_rss_mb": worst, "seconds_to_merge_once": round(merging, 1)}
    print(f"| {' | '.join(name.replace('_', ' ') for name in rows)} |\n|{'---:|' * len(rows)}")
    print(f"| {' | '.join(f'{value:,}' for value in rows.values())} |")


if __name__ == "__main__":
    main()

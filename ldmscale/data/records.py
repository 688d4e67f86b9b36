"""The index record of one shard: one line of json (size, version, count, damage, statistics), then its spans.

It lies in `.ldmscale_index/` beside the shard, or in the cache where that folder cannot be written or is
remote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec

from ldmscale.data.files import cache_folder, write_file
from ldmscale.data.scan import CHECKS, Scan, damage_to_json, json_line, scan_shard
from ldmscale.data.shards import ShardState, is_local, local_path, shard_name
from ldmscale.errors import DataError

log = logging.getLogger(__name__)

FORMAT = "ldmscale-index-1"
FOLDER = ".ldmscale_index"
_REMOTE_BLOCK = 16 * 1024 * 1024


def read_record(url: str) -> dict[str, Any] | None:
    path = find(url, f"{shard_name(url)}.idx")
    if path is None:
        return None
    try:
        with open(path, "rb") as stream:
            record = json.loads(stream.readline())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def _folders(url: str) -> list[Path]:
    """Where a shard's index may lie: beside it (local shards), and in the cache."""
    if is_local(url):
        parent = os.path.dirname(local_path(url))
        return [
            Path(parent) / FOLDER,
            cache_folder("index") / hashlib.sha256(parent.encode()).hexdigest()[:24],
        ]
    return [cache_folder("index") / hashlib.sha256(url.rsplit("/", 1)[0].encode()).hexdigest()[:24]]


def find(url: str, name: str) -> Path | None:
    """The newest of the files of this name that exist."""
    found = [folder / name for folder in _folders(url) if (folder / name).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns) if found else None


def writable_folder(url: str) -> Path:
    for folder in _folders(url):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise DataError(
        f"no index can be written for {url}: neither of {[str(f) for f in _folders(url)]} is writable; set "
        "LDMSCALE_CACHE"
    )


def _write_beside(url: str, name: str, parts: Sequence[bytes]) -> None:
    write_file(writable_folder(url) / name, parts)


def covers(record: dict[str, Any], check: str, caption_source: str, max_pixels: int) -> bool:
    if CHECKS.index(record["check"]) < CHECKS.index(check):
        return False
    return record["caption"] == caption_source and (check == "spans" or record["max_pixels"] == max_pixels)


def fresh(record: dict[str, Any], state: ShardState) -> bool:
    return bool(record["size"] == state.size and record["version"] == state.version)


def index_shard(
    url: str, state: ShardState, check: str, caption_source: str, max_pixels: int
) -> dict[str, Any]:
    scan = _scan(url, state.size, check, caption_source, max_pixels)
    record = {
        "format": FORMAT,
        "url": url,
        "size": state.size,
        "version": state.version,
        "samples": len(scan.spans),
        "check": check,
        "caption": caption_source,
        "max_pixels": max_pixels,
        "damage": damage_to_json(scan.damage),
        "damage_counts": scan.damage_counts,
        "statistics": scan.statistics.to_json(),
    }
    if scan.damage:
        log.warning("%s: %d damaged, first: %s", url, sum(scan.damage_counts.values()), scan.damage[0])
    _write_beside(url, f"{shard_name(url)}.idx", [json_line(record), scan.spans.tobytes()])
    return record


def _scan(url: str, size: int, check: str, caption_source: str, max_pixels: int) -> Scan:
    stream: Any
    if is_local(url):
        stream = open(local_path(url), "rb", buffering=256 * 1024)  # noqa: SIM115 (closed below)
    else:
        fs, path = fsspec.core.url_to_fs(url)
        stream = fs.open(path, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead")
    with closing(stream):

        def read(offset: int, count: int) -> bytes:
            stream.seek(offset)
            return bytes(stream.read(count))

        return scan_shard(read, size, url, check=check, caption_source=caption_source, max_pixels=max_pixels)

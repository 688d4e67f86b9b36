"""What is known of one shard, in files of their own: a line of json, then numbers, one a sample.

    00000.tar.idx              size, version, count, damage, statistics; then the spans
    00000.tar.SELECTION.sel    what a selection takes of it: counts by bucket and by reason; then a code byte each

They lie in `.ldmscale_index/` beside the shard, or in the cache where that folder cannot be written or is remote.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from ldmscale import messages, redact
from ldmscale.data.conditions.validation import ConditionChecks
from ldmscale.data.shards.damage import damage_to_json
from ldmscale.data.shards.scan import (
    CHECKS,
    SPAN,
    Scan,
    json_line,
    scan_shard,
)
from ldmscale.data.shards.selection import FORMAT as SELECTION_FORMAT
from ldmscale.data.shards.selection import Selection
from ldmscale.data.shards.tar import Read
from ldmscale.data.shards.urls import is_local, local_path, shard_name
from ldmscale.errors import DataError, LdmscaleError
from ldmscale.storage.atomic import cache_folder, write_file
from ldmscale.storage.digest import sha256
from ldmscale.storage.object_store import ShardState, Storage
from ldmscale.storage.plain_values import Count, checked, parsed

log = logging.getLogger(__name__)

FORMAT = "ldmscale-index-1"
FOLDER = ".ldmscale_index"
_REMOTE_BLOCK = 16 * 1024 * 1024


Record = dict[str, Any]
_Digits = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class IndexWriteError(LdmscaleError):
    """The folder of an index cannot be written: full, read-only. No fault of a shard."""


class _Common(BaseModel):
    size: Count
    version: str | Count | None
    samples: Count


class _Statistics(BaseModel):
    captions: Count
    images: Count
    words: dict[_Digits, Count]
    short_side: dict[_Digits, Count]
    smallest: tuple[Count, Count] | None
    largest: tuple[Count, Count] | None


class _Damage(BaseModel):
    key: str
    kind: str
    detail: str
    sample: Count | None = None


class _Record(_Common):
    check: Literal[CHECKS]  # type: ignore[valid-type]
    caption: str
    max_pixels: Count
    damage: list[_Damage]
    damage_counts: dict[str, Count]
    faulty: list[tuple[Count, str]] = []  # records of earlier versions have none
    statistics: _Statistics


class _Taken(_Common):
    buckets: list[Count]
    dropped: dict[str, Count]


def read_record(url: str) -> Record | None:
    """The record of a shard, None if it was not looked through or the record is damaged."""
    return _first_line(url, f"{shard_name(url)}.idx", FORMAT, _Record)


def read_selection(url: str, selection: Selection) -> Record | None:
    """What the selection takes of a shard, None if that was not looked at or the record is damaged."""
    return _first_line(url, _selection_name(url, selection), SELECTION_FORMAT, _Taken)


def read_spans(url: str, count: int, size: int) -> np.ndarray:
    """The spans behind a record, within the `size` bytes of the shard: SPAN [count]. Raises DataError if they are not."""
    spans = _behind_line(url, name := f"{shard_name(url)}.idx", SPAN, count)
    # Compared without a sum, which could wrap around.
    outside = (spans["offset"] > size) | (spans["nbytes"] > size - np.minimum(spans["offset"], size))
    if outside.any():
        at = int(np.argmax(outside))
        raise _damaged(
            find(url, name),
            f"sample {at} has {spans['nbytes'][at]} bytes at offset {spans['offset'][at]}, the shard has {size}",
            url,
        )
    return spans


def read_codes(url: str, selection: Selection, count: int) -> np.ndarray:
    """The codes behind a selection: uint8 [count]."""
    return _behind_line(url, _selection_name(url, selection), np.dtype(np.uint8), count)


def _damaged(path: Path | None, what: object, url: str) -> DataError:
    return DataError(
        f"the index {path} is damaged ({what}); delete it and run `ldmscale index data.shards={url}`"
    )


def _selection_name(url: str, selection: Selection) -> str:
    return f"{shard_name(url)}.{selection.key}.sel"


def _first_line(url: str, name: str, format: str, kind: type[BaseModel]) -> Record | None:
    path = find(url, name)
    if path is None:
        return None
    try:
        with open(path, "rb") as stream:
            record = parsed(stream.readline())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("format") != format:
        return None
    try:
        checked(kind, record)
    except ValueError as error:
        log.warning("the index %s is damaged (%s): it does not count", path, error)
        return None
    return record


def _behind_line(url: str, name: str, kind: np.dtype[Any], count: int) -> np.ndarray:
    path = find(url, name)
    try:
        with open(path or name, "rb") as stream:
            stream.readline()
            data = stream.read()
    except OSError as error:
        raise DataError(
            f"the index of shard {url} vanished while it was read; run `ldmscale index data.shards={url}`"
        ) from error
    if len(data) != count * kind.itemsize:
        what = f"found {len(data)} bytes for {count} samples, expected {count * kind.itemsize}"
        raise _damaged(path, what, url)
    return np.frombuffer(data, dtype=kind)


def _folders(url: str) -> list[Path]:
    """Where a shard's index may lie: beside it (local shards), and in the cache."""
    if is_local(url):
        parent = os.path.dirname(local_path(url))
        return [
            Path(parent) / FOLDER,
            cache_folder("index") / sha256(parent)[:24],
        ]
    return [cache_folder("index") / sha256(url.rsplit("/", 1)[0])[:24]]


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


def write_index(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file of the index. Raises IndexWriteError where the folder is full or the like."""
    try:
        write_file(path, parts)
    except OSError as error:
        raise IndexWriteError(
            f"the index cannot be written to {path.parent} ({error}): free room there, or make it writable, and run the same "
            "command again; the shards are not damaged"
        ) from error


def covers(
    record: dict[str, Any],
    check: str,
    caption_source: str,
    max_pixels: int,
    conditions: ConditionChecks | None = None,
) -> bool:
    if CHECKS.index(record["check"]) < CHECKS.index(check):
        return False
    if check != "spans" and record.get("conditions") != _plain(conditions):
        return False
    return record["caption"] == caption_source and (check == "spans" or record["max_pixels"] == max_pixels)


def _plain(conditions: ConditionChecks | None) -> dict[str, Any] | None:
    """As json gives it back."""
    found: dict[str, Any] | None = json.loads(json.dumps(None if conditions is None else conditions.plain()))
    return found


def fresh(record: dict[str, Any], state: ShardState) -> bool:
    return bool(record["size"] == state.size and record["version"] == state.version)


def index_shard(
    url: str,
    state: ShardState,
    check: str,
    caption_source: str,
    max_pixels: int,
    *,
    storage: Storage,
    selection: Selection | None = None,
    keep_record: bool = False,
    conditions: ConditionChecks | None = None,
) -> Record:
    """Looks through a shard, writes its record (unless the one there is to be kept) and its selection."""
    scan = _scan(url, state.size, check, caption_source, max_pixels, storage, selection, conditions)
    common = {
        "url": redact.text(url),
        "size": state.size,
        "version": state.version,
        "samples": len(scan.spans),
    }
    record = {
        "format": FORMAT,
        **common,
        "check": check,
        "caption": caption_source,
        "max_pixels": max_pixels,
        "conditions": _plain(conditions),
        "damage": damage_to_json(scan.damage),
        "damage_counts": scan.damage_counts,
        "faulty": scan.faulty,
        "statistics": scan.statistics.to_json(),
    }
    if not keep_record:
        if scan.damage:
            count = sum(scan.damage_counts.values())
            log.warning("%s: %d damaged, first: %s", messages.name(url), count, scan.damage[0])
        write_index(
            writable_folder(url) / f"{shard_name(url)}.idx", [json_line(record), scan.spans.tobytes()]
        )
    if selection is not None:
        taken = {
            "format": SELECTION_FORMAT,
            **common,
            "selection": asdict(selection),
            "buckets": np.bincount(scan.codes, minlength=selection.buckets + 1)[1:].tolist(),
            "dropped": scan.dropped,
        }
        write_index(
            writable_folder(url) / _selection_name(url, selection), [json_line(taken), scan.codes.tobytes()]
        )
    return record


def _scan(
    url: str,
    size: int,
    check: str,
    caption_source: str,
    max_pixels: int,
    storage: Storage,
    selection: Selection | None,
    conditions: ConditionChecks | None,
) -> Scan:
    def scan(read: Read) -> Scan:
        return scan_shard(
            read,
            size,
            url,
            check=check,
            caption_source=caption_source,
            max_pixels=max_pixels,
            selection=selection,
            conditions=conditions,
        )

    if not is_local(url):
        return scan(_Window(url, size, storage).read)
    with open(local_path(url), "rb", buffering=256 * 1024) as stream:

        def seek_and_read(offset: int, count: int) -> bytes:
            stream.seek(offset)
            return bytes(stream.read(count))

        return scan(seek_and_read)


class _Window:
    """Reads an object through one window of some megabytes that moves on: few requests, each tried again if need be."""

    def __init__(self, url: str, size: int, storage: Storage) -> None:
        self.url, self.size, self.storage = url, size, storage
        self.start, self.data = 0, b""

    def read(self, offset: int, count: int) -> bytes:
        end = min(offset + count, self.size)
        if offset < self.start or end > self.start + len(self.data):
            self.start = offset
            last = min(max(end, offset + _REMOTE_BLOCK), self.size)
            self.data = self.storage.read(self.url, offset, last) if last > offset else b""
        return self.data[offset - self.start : end - self.start]

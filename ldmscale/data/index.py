"""The index of shards: where each sample lies, 12 bytes a sample, memory-mapped; and what is damaged.

    SHARDS/.ldmscale_index/00000.tar.idx   one line of json (size, count, damage, statistics), then the spans
    SHARDS/.ldmscale_index/set-*.idx       spans of a whole list of shards in one file, made from the others

Where the shards' folder cannot be written (or is remote) the files lie in `~/.cache/ldmscale/index`. Every
file appears whole, so ranks may share the work or repeat it. A shard that changed since is refused: its order
would be another.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldmscale.data.decode import MAX_PIXELS
from ldmscale.data.files import write_file
from ldmscale.data.records import FORMAT, covers, find, fresh, index_shard, read_record, writable_folder
from ldmscale.data.scan import (
    CHECKS,
    SPAN,
    Damage,
    Statistics,
    damage_from_json,
    json_line,
    quantile,
)
from ldmscale.data.shards import ShardState, shard_name, shard_states
from ldmscale.errors import DataError

log = logging.getLogger(__name__)

_LISTED = 10


class ShardIndex:
    """Where every sample of a list of shards lies. Made by `open` or `build`; may be pickled to workers.

    Attributes:
        shards: URLs, in the order given.
        counts: samples in each, int64 [shards].
        sizes: bytes of each, int64 [shards].
        total: samples in all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as stream:
            line = stream.readline()
        header = json.loads(line)
        self.shards: list[str] = header["urls"]
        self.counts = np.array(header["counts"], dtype=np.int64)
        self.sizes = np.array(header["sizes"], dtype=np.int64)
        self.total = int(self.counts.sum())
        self._first = np.concatenate([[0], np.cumsum(self.counts)])
        self._spans: np.ndarray = (
            np.memmap(path, dtype=SPAN, mode="r", offset=len(line), shape=(self.total,))
            if self.total
            else np.empty(0, dtype=SPAN)
        )

    def __reduce__(self) -> tuple[type[ShardIndex], tuple[Path]]:
        return ShardIndex, (self.path,)  # workers map the same file anew

    def span(self, shard: int, index: int) -> tuple[int, int]:
        """Returns (offset, bytes) of sample `index` of shard number `shard`.

        Raises:
            IndexError: if the shard has no such sample.
        """
        if not 0 <= index < self.counts[shard]:
            raise IndexError(f"{self.shards[shard]} has {self.counts[shard]} samples, no number {index}")
        offset, nbytes = self._spans[self._first[shard] + index]
        return int(offset), int(nbytes)

    @property
    def fingerprint(self) -> str:
        """Identifies the set by names, sizes and counts, in order: a resume with another set is none."""
        names = [shard_name(url) for url in self.shards]
        return hashlib.sha256(
            json.dumps([names, self.sizes.tolist(), self.counts.tolist()]).encode()
        ).hexdigest()[:16]

    @classmethod
    def open(cls, shards: Sequence[str], *, build_missing: bool = False) -> ShardIndex:
        """Opens the index of `shards`.

        Args:
            shards: URLs as `shards.expand` gives them.
            build_missing: look through shards that have no index yet (tar headers only) instead of raising.

        Raises:
            DataError: naming every shard that is missing, not indexed or changed since it was indexed, with
                the remedy; or if there is no sample in any.
        """
        urls = list(shards)
        states, faults = _states(urls)
        if faults:
            raise DataError(_some(faults))
        merged = _merged_path(urls, states)
        if not merged.exists():
            records = [read_record(url) for url in urls]
            if build_missing:
                new = [number for number, record in enumerate(records) if record is None]
                for number in new:
                    index_shard(urls[number], states[number], "spans", "txt", MAX_PIXELS)
                    records[number] = read_record(urls[number])
            _merge(urls, states, records, merged)
        index = cls(merged)
        if index.total == 0:
            raise DataError(
                f"the {len(urls)} shards hold no sample at all; look at what `ldmscale index "
                "data.shards=...` says"
            )
        return index

    @classmethod
    def build(
        cls,
        shards: Sequence[str],
        *,
        check: str = "spans",
        caption_source: str = "txt",
        max_pixels: int = MAX_PIXELS,
        rank: int = 0,
        world: int = 1,
    ) -> ShardIndex | None:
        """Looks through every shard that is new or changed since, and opens the index.

        With several ranks each takes every world-th shard and gets None; call `open` behind a barrier.

        Raises:
            DataError: if a shard is missing or cannot be read, or none holds a sample.
        """
        report = check_shards(
            shards, check, caption_source=caption_source, max_pixels=max_pixels, rank=rank, world=world
        )
        gone = [str(item) for item in report.damage if item.kind in ("missing_shard", "unreadable_shard")]
        if gone:
            raise DataError(_some([f"{item}; check data.shards" for item in gone]))
        return cls.open(shards) if world == 1 else None


class IndexReport:
    """What `ldmscale index` tells: counts, damage, and what captions and images are like."""

    def __init__(self, check: str) -> None:
        self.check = check
        self.shards = 0
        self.samples = 0
        self.nbytes = 0
        self.looked_through = 0  # shards that were read now; the others were indexed before
        self.damage: list[Damage] = []  # up to 200 a shard
        self.damage_counts: dict[str, int] = {}  # all of it, by kind
        self.statistics = Statistics()

    @property
    def damaged(self) -> int:
        """Damages found in all, harmless ones included."""
        return sum(self.damage_counts.values())

    def add(self, damage: Sequence[Damage], counts: dict[str, int]) -> None:
        self.damage.extend(damage)
        for kind, count in counts.items():
            self.damage_counts[kind] = self.damage_counts.get(kind, 0) + count

    def to_json(self) -> dict[str, Any]:
        """The report as plain values. Caption lengths are words, sides are pixels rounded down to 32."""
        found = self.statistics
        return {
            "check": self.check,
            "shards": self.shards,
            "samples": self.samples,
            "bytes": self.nbytes,
            "looked_through": self.looked_through,
            "damaged": self.damaged,
            "damage_counts": dict(sorted(self.damage_counts.items())),
            "damage": [
                {"shard": item.shard, "key": item.key, "kind": item.kind, "detail": item.detail}
                for item in self.damage
            ],
            "captions": {
                "count": found.captions,
                **{f"words_p{share}": quantile(found.words, share / 100) for share in (5, 50, 95)},
            },
            "images": {
                "count": found.images,
                "smallest": found.smallest,
                "largest": found.largest,
                **{f"short_side_p{share}": quantile(found.short_side, share / 100) for share in (5, 50, 95)},
            },
        }


def check_shards(
    shards: Sequence[str],
    check: str = "headers",
    *,
    caption_source: str = "txt",
    max_pixels: int = MAX_PIXELS,
    rank: int = 0,
    world: int = 1,
    on_shard: Callable[[str, int, int], None] | None = None,
) -> IndexReport:
    """Looks through shards, writes their index, and reports on all of them. Goes on after any fault.

    Shards that were looked through before, at least as closely and with the same settings, and have not
    changed since are reported from their record. With several ranks each takes every world-th shard;
    afterwards one rank may call it again for all, which then only reads the records.

    Args:
        shards: URLs as `shards.expand` gives them.
        check: "spans", "headers" or "decode" (`scan.CHECKS`).
        on_shard: called with (url, done, of) after each shard.

    Raises:
        DataError: if the index cannot be written anywhere.
        ValueError: for an unknown check.
    """
    if check not in CHECKS:
        raise ValueError(f"check must be one of {CHECKS}, got {check!r}")
    mine = list(shards)[rank::world]
    report = IndexReport(check)
    for done, (url, state) in enumerate(zip(mine, shard_states(mine), strict=True), 1):
        report.shards += 1
        if isinstance(state, str):
            report.add([Damage(url, "", "missing_shard", state)], {"missing_shard": 1})
        else:
            _report_shard(report, url, state, caption_source, max_pixels)
        if on_shard is not None:
            on_shard(url, done, len(mine))
    return report


def _report_shard(
    report: IndexReport, url: str, state: ShardState, caption_source: str, max_pixels: int
) -> None:
    record = read_record(url)
    if (
        record is None
        or not fresh(record, state)
        or not covers(record, report.check, caption_source, max_pixels)
    ):
        try:
            record = index_shard(url, state, report.check, caption_source, max_pixels)
        except (OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            report.add([Damage(url, "", "unreadable_shard", reason)], {"unreadable_shard": 1})
            return
        report.looked_through += 1
    report.samples += record["samples"]
    report.nbytes += record["size"]
    report.add(damage_from_json(url, record["damage"]), record["damage_counts"])
    report.statistics.add(Statistics.from_json(record["statistics"]))


def _states(urls: Sequence[str]) -> tuple[list[ShardState], list[str]]:
    found = shard_states(urls)
    states = [state for state in found if isinstance(state, ShardState)]
    faults = [
        f"shard {url} cannot be found: {state}; check data.shards"
        for url, state in zip(urls, found, strict=True)
        if isinstance(state, str)
    ]
    return states, faults


def _merge(
    urls: list[str], states: list[ShardState], records: list[dict[str, Any] | None], merged: Path
) -> None:
    faults = []
    for url, state, record in zip(urls, states, records, strict=True):
        if record is None:
            faults.append(
                f"shard {url} has no index; run `ldmscale index data.shards={url}` (or with your whole "
                "pattern)"
            )
        elif not fresh(record, state):
            was, now = (record["size"], record["version"]), (state.size, state.version)
            faults.append(
                f"shard {url} changed since it was indexed (size and version {was}, now {now}); if that was "
                f"meant, run `ldmscale index data.shards={url}`"
            )
    if faults:
        raise DataError(_some(faults))
    known = [record for record in records if record is not None]
    header = {
        "format": FORMAT,
        "urls": urls,
        "sizes": [state.size for state in states],
        "counts": [record["samples"] for record in known],
    }
    for old in merged.parent.glob(f"{merged.name.rsplit('-', 1)[0]}-*.idx"):
        if old != merged:
            old.unlink(missing_ok=True)  # the same list at an earlier time; who has it mapped keeps it
    write_file(merged, _merged_parts(header, urls))


def _merged_parts(header: dict[str, Any], urls: list[str]) -> Any:
    yield json_line(header)
    for url, count in zip(urls, header["counts"], strict=True):
        path = find(url, f"{shard_name(url)}.idx")
        if path is None:
            raise DataError(
                f"the index of shard {url} vanished while it was read; run `ldmscale index data.shards={url}`"
            )
        with open(path, "rb") as stream:
            stream.readline()
            spans = stream.read()
        if len(spans) != count * SPAN.itemsize:
            raise DataError(
                f"the index {path} is damaged; delete it and run `ldmscale index data.shards={url}`"
            )
        yield spans


def _merged_path(urls: list[str], states: list[ShardState]) -> Path:
    which = hashlib.sha256(json.dumps([FORMAT, urls]).encode()).hexdigest()[:16]
    version = hashlib.sha256(
        json.dumps([[state.size, state.version] for state in states]).encode()
    ).hexdigest()[:16]
    name = f"set-{which}-{version}.idx"
    return find(urls[0], name) or writable_folder(urls[0]) / name


def _some(faults: list[str]) -> list[str]:
    return (
        faults
        if len(faults) <= _LISTED
        else [*faults[:_LISTED], f"... and {len(faults) - _LISTED} more shards"]
    )

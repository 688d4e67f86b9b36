"""Looks through shards and reports: counts, statistics, what is damaged, what a selection takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ldmscale.data.conditions.validation import ConditionChecks
from ldmscale.data.images.decode import MAX_PIXELS
from ldmscale.data.shards.damage import UNUSABLE, Damage, damage_from_json
from ldmscale.data.shards.records import (
    Record,
    covers,
    fresh,
    index_shard,
    read_codes,
    read_record,
    read_selection,
)
from ldmscale.data.shards.scan import CHECKS, Statistics, quantile
from ldmscale.data.shards.selection import Selection
from ldmscale.data.shards.urls import run_pipes, shard_states
from ldmscale.storage.object_store import ShardState, Storage


class IndexReport:
    """What `ldmscale index` tells: counts, damage, and what captions and images are like."""

    def __init__(self, check: str) -> None:
        self.check = check
        self.shards = 0
        self.samples = 0
        self.nbytes = 0
        self.unusable = 0  # samples that training replaces; records of earlier versions count each damage
        self.looked_through = 0  # shards that were read now; the others were indexed before
        self.damage: list[Damage] = []  # up to 200 a shard
        self.damage_counts: dict[str, int] = {}  # all of it, by kind
        self.statistics = Statistics()
        self.selected: int | None = None  # None: no selection was asked for, all samples are taken
        self.dropped: Counter[str] = Counter()  # samples not taken, by reason
        self.buckets: list[int] = []  # samples taken, by bucket

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
            "selected": self.samples if self.selected is None else self.selected,
            "dropped": dict(sorted(self.dropped.items())),
            "buckets": self.buckets,
        }


def check_shards(
    shards: Sequence[str],
    check: str = "headers",
    *,
    caption_source: str = "txt",
    max_pixels: int = MAX_PIXELS,
    rank: int = 0,
    world: int = 1,
    selection: Selection | None = None,
    storage: Storage | None = None,
    on_shard: Callable[[str, int, int], None] | None = None,
    conditions: ConditionChecks | None = None,
) -> IndexReport:
    """Looks through shards, writes their index, and reports on all of them. Goes on after any fault.

    Shards that were looked through before, at least as closely and with the same settings, and have not
    changed since are reported from their record. With several ranks each takes every world-th shard;
    afterwards one rank may call it again for all, which then only reads the records.

    Args:
        shards: URLs as `shards.expand` gives them.
        check: "spans", "headers" or "decode" (`scan.CHECKS`).
        selection: what a run is to take; makes the selection's own index, too.
        storage: how remote shards are reached.
        on_shard: called with (url, done, of) after each shard.
        conditions: labels, boxes or maps that a run would read, to be looked at, too.

    Raises:
        DataError: if the index cannot be written anywhere.
        ValueError: for an unknown check.
    """
    if check not in CHECKS:
        raise ValueError(f"check must be one of {CHECKS}, got {check!r}")
    store = storage or Storage()
    mine = list(shards)[rank::world]
    run_pipes(mine)
    report = IndexReport(check)
    for done, (url, state) in enumerate(zip(mine, shard_states(mine, store), strict=True), 1):
        report.shards += 1
        if isinstance(state, str):
            report.add([Damage(url, "", "missing_shard", state)], {"missing_shard": 1})
        else:
            _report_shard(report, url, state, caption_source, max_pixels, selection, store, conditions)
        if on_shard is not None:
            on_shard(url, done, len(mine))
    return report


def _report_shard(
    report: IndexReport,
    url: str,
    state: ShardState,
    caption_source: str,
    max_pixels: int,
    selection: Selection | None,
    storage: Storage,
    conditions: ConditionChecks | None,
) -> None:
    record = read_record(url)
    usable = (
        record is not None
        and fresh(record, state)
        and covers(record, report.check, caption_source, max_pixels, conditions)
    )
    taken = None if selection is None else read_selection(url, selection)
    if not usable or (selection is not None and not (taken and fresh(taken, state))):
        check = "spans" if usable else report.check  # for a new selection alone nothing is examined again
        try:
            made = index_shard(
                url,
                state,
                check,
                caption_source,
                max_pixels,
                storage=storage,
                selection=selection,
                keep_record=usable,
                conditions=None if check == "spans" else conditions,
            )
        except (OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            report.add([Damage(url, "", "unreadable_shard", reason)], {"unreadable_shard": 1})
            return
        record = record if usable else made
        taken = None if selection is None else read_selection(url, selection)
        report.looked_through += 1
    assert record is not None
    report.samples += record["samples"]
    report.nbytes += record["size"]
    report.add(*_of_selected(url, record, selection if taken is not None else None))
    report.unusable += _unusable(url, record, selection if taken is not None else None)
    report.statistics.add(Statistics.from_json(record["statistics"]))
    if taken is not None:
        _add_selected(report, taken)


def _of_selected(
    url: str, record: Record, selection: Selection | None
) -> tuple[list[Damage], dict[str, int]]:
    """The damages of a shard and their counts, without those of samples that the selection leaves out."""
    damage, counts = damage_from_json(url, record["damage"]), record["damage_counts"]
    if selection is None or not record.get("faulty"):
        return damage, counts
    codes = read_codes(url, selection, record["samples"])
    left_out = {number for number, _ in record["faulty"] if number < len(codes) and codes[number] == 0}
    others: Counter[str] = Counter(counts) - Counter(
        kind for number, kind in record["faulty"] if number in left_out
    )
    return [item for item in damage if item.sample not in left_out], dict(others)


def _unusable(url: str, record: Record, selection: Selection | None) -> int:
    """Samples of a shard that are selected and cannot be used, each once, however many damages it has."""
    if "faulty" not in record:
        return sum(count for kind, count in record["damage_counts"].items() if kind in UNUSABLE)
    numbers = {number for number, kind in record["faulty"] if kind in UNUSABLE}
    if selection is None or not numbers:
        return len(numbers)
    codes = read_codes(url, selection, record["samples"])
    return sum(number < len(codes) and codes[number] != 0 for number in numbers)


def _add_selected(report: IndexReport, taken: Record) -> None:
    buckets = np.array(taken["buckets"])
    report.buckets = (buckets if not report.buckets else np.array(report.buckets) + buckets).tolist()
    report.selected = sum(report.buckets)
    report.dropped.update(taken["dropped"])

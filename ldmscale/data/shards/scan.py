"""Looks through one shard: where its samples lie, what is damaged, what captions and images are like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ldmscale.data.conditions.annotations import caption_member, caption_of
from ldmscale.data.conditions.record import parse_record
from ldmscale.data.conditions.validation import ConditionChecks
from ldmscale.data.images.decode import (
    EXTENSIONS,
    LATENT,
    MAX_PIXELS,
    ImageHeader,
    decode_array,
    format_of,
    image_header,
    verify_image,
)
from ldmscale.data.shards.damage import Damage
from ldmscale.data.shards.selection import Selection
from ldmscale.data.shards.tar import Member, Read, TarFault, members, split_name
from ldmscale.errors import DataError
from ldmscale.storage.given_files import is_lfs_pointer, lfs_fault

SPAN = np.dtype([("offset", "<u8"), ("nbytes", "<u4")])
"""A sample in 12 bytes: `offset` of its first tar header, `nbytes` up to the end of its last member."""

CHECKS = ("spans", "headers", "decode")
"""How closely to look: tar headers only; also captions and image headers; also every pixel and array."""

_LISTED = 200  # damages kept by name for each shard; all are counted
_LISTED_MEMBERS = 8
_HEAD = 64 * 1024  # enough of an image to learn its size, nearly always


@dataclass
class Statistics:
    """What captions and images are like, as counts that can be added up over shards."""

    captions: int = 0
    images: int = 0
    words: dict[int, int] = field(
        default_factory=dict
    )  # words of a caption (256 and more as 256) -> captions
    short_side: dict[int, int] = field(default_factory=dict)  # short side rounded down to 32 pixels -> images
    smallest: tuple[int, int] | None = None  # width, height of the image with the fewest pixels
    largest: tuple[int, int] | None = None

    def add_caption(self, caption: str) -> None:
        self.captions += 1
        words = min(len(caption.split()), 256)
        self.words[words] = self.words.get(words, 0) + 1

    def add_image(self, width: int, height: int) -> None:
        self.images += 1
        side = min(width, height) // 32 * 32
        self.short_side[side] = self.short_side.get(side, 0) + 1
        self._stretch((width, height))

    def _stretch(self, size: tuple[int, int]) -> None:
        if self.smallest is None or size[0] * size[1] < self.smallest[0] * self.smallest[1]:
            self.smallest = size
        if self.largest is None or size[0] * size[1] > self.largest[0] * self.largest[1]:
            self.largest = size

    def add(self, other: Statistics) -> None:
        self.captions += other.captions
        self.images += other.images
        for mine, theirs in ((self.words, other.words), (self.short_side, other.short_side)):
            for value, count in theirs.items():
                mine[value] = mine.get(value, 0) + count
        for size in (other.smallest, other.largest):
            if size is not None:
                self._stretch(size)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Statistics:
        return cls(
            captions=record["captions"],
            images=record["images"],
            words={int(value): count for value, count in record["words"].items()},
            short_side={int(value): count for value, count in record["short_side"].items()},
            smallest=tuple(record["smallest"]) if record["smallest"] else None,
            largest=tuple(record["largest"]) if record["largest"] else None,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def quantile(histogram: dict[int, int], share: float) -> int:
    """The value below or at which `share` of a histogram's counts lie (0 of an empty one)."""
    wanted = share * sum(histogram.values())
    passed = 0
    for value in sorted(histogram):
        passed += histogram[value]
        if passed >= wanted:
            return value
    return 0


@dataclass
class Scan:
    """What was found in one shard."""

    spans: np.ndarray  # SPAN [samples]
    damage: list[Damage]
    damage_counts: dict[str, int]
    statistics: Statistics
    codes: np.ndarray  # uint8 [samples]: 0 not selected, else the bucket + 1
    dropped: dict[str, int]  # samples that were not selected, by reason
    faulty: list[
        tuple[int, str]
    ]  # number of a sample and kind of its damage, of all that have a place among the samples


def scan_shard(
    read: Read,
    size: int,
    shard: str,
    *,
    check: str = "headers",
    caption_source: str = "txt",
    max_pixels: int = MAX_PIXELS,
    selection: Selection | None = None,
    conditions: ConditionChecks | None = None,
) -> Scan:
    """Looks through a shard of `size` bytes.

    A sample whose members can be read is in the spans, damaged or not: what cannot be decoded is replaced and
    written to the ledger when its turn comes, so that order and counts do not depend on how closely somebody
    once looked. Members with unsafe names, links and devices count as absent. `selection` says which samples a
    run takes; without one it takes all. `conditions` says what else a run would read; "spans" does not look at it.

    Raises:
        ValueError: for an unknown check.
    """
    if check not in CHECKS:
        raise ValueError(f"check must be one of {CHECKS}, got {check!r}")
    return _Scanner(read, size, shard, check, caption_source, max_pixels, selection, conditions).run()


class _Scanner:
    def __init__(
        self,
        read: Read,
        size: int,
        shard: str,
        check: str,
        caption_source: str,
        max_pixels: int,
        selection: Selection | None,
        conditions: ConditionChecks | None,
    ) -> None:
        self.selection, self.conditions = selection, conditions
        self.codes: list[int] = []
        self.dropped: Counter[str] = Counter()
        self.read, self.size, self.shard = read, size, shard
        self.check, self.caption_source, self.max_pixels = check, caption_source, max_pixels
        self.spans: list[tuple[int, int]] = []
        self.damage: list[Damage] = []
        self.counts: Counter[str] = Counter()
        self.statistics = Statistics()
        self.keys: set[str] = set()
        self.faulty: list[tuple[int, str]] = []
        self.sample: int | None = None  # that is being looked at

    def run(self) -> Scan:
        key: str | None = None
        group: dict[str, Member] = {}
        repeated: list[Member] = []  # of the sample, with an extension that an earlier member has
        try:
            for member in members(self.read, self.size):
                if member.refused:
                    if "sparse" in member.refused:
                        kind, detail = "sparse_member", member.refused
                    else:
                        kind = "unsafe_name" if "name" in member.refused else "special_member"
                        detail = f"{member.refused}; never followed"
                    self.note(member.name, kind, detail)
                    continue
                named = split_name(member.name)
                if named is None:
                    continue  # README, LICENSE, .DS_Store: files that belong to no sample
                if named[0] != key:
                    self.close(key, group, repeated)
                    key, group, repeated = named[0], {}, []
                if named[1] in group:
                    self.note(key, "duplicate_member", f"two members end with .{named[1]}; the first counts")
                    repeated.append(member)  # keeps the span whole
                else:
                    group[named[1]] = member
        except TarFault as fault:
            self.close(key, group, repeated)
            if is_lfs_pointer(self.read(0, 64)):
                self.note("", "corrupt_header", lfs_fault(self.shard))
            else:
                self.note("", fault.kind, fault.detail)
        else:
            self.close(key, group, repeated)
        if not self.spans:
            self.note("", "empty_shard", f"no sample in {self.size} bytes")
        return Scan(
            np.array(self.spans, dtype=SPAN),
            self.damage,
            dict(self.counts),
            self.statistics,
            np.array(self.codes, dtype=np.uint8),
            dict(self.dropped),
            self.faulty,
        )

    def note(self, key: str, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        if self.sample is not None:
            self.faulty.append((self.sample, kind))
        if len(self.damage) < _LISTED:
            self.damage.append(Damage(self.shard, key, kind, detail, self.sample))

    def close(self, key: str | None, group: dict[str, Member], repeated: list[Member]) -> None:
        """Ends a sample: its span, and what is wrong with it."""
        if key is None or not group:
            return
        everything = [*group.values(), *repeated]
        start = min(member.start for member in everything)
        nbytes = max(member.end for member in everything) - start
        if nbytes >= 2**32:
            self.note(key, "too_large", f"{nbytes} bytes; samples must be smaller than 4 GiB")
            return
        if key in self.keys:
            self.note(
                key,
                "scattered_sample",
                "the key comes again later in the shard; write members of a sample one after another (tar "
                "--sort=name)",
            )
        self.keys.add(key)
        self.spans.append((start, nbytes))
        self.sample = len(self.spans) - 1
        try:
            self.examine(key, group)
        finally:
            self.sample = None

    def examine(self, key: str, group: dict[str, Member]) -> None:
        """What is wrong with the members of a sample."""
        image = next((extension for extension in EXTENSIONS if extension in group), None)
        self.select(group, image)
        caption = caption_member(self.caption_source)
        if image is None and LATENT not in group:
            self.note(key, "missing_member", f"no image and no {LATENT} (members: {_listed(group)})")
        if caption not in group:
            self.note(key, "missing_member", f"no .{caption} for the caption (members: {_listed(group)})")
        for extension, member in group.items():
            if member.size == 0:
                self.note(key, "empty_member", f".{extension} has 0 bytes")
        if self.check == "spans":
            return
        if caption in group and group[caption].size:
            self.examine_caption(key, group[caption], caption)
        if "json" in group and group["json"].size and caption != "json":
            self.examine_json(key, group["json"])
        if image is not None and group[image].size:
            self.examine_image(key, image, group[image])
        if LATENT in group and self.check == "decode" and group[LATENT].size:
            self.examine_latent(key, group[LATENT])
        if self.conditions is not None:
            self.examine_conditions(key, self.conditions, group, image)

    def select(self, group: dict[str, Member], image: str | None) -> None:
        if self.selection is None:
            self.codes.append(1)
            return

        def member(extension: str) -> bytes | None:
            return self.bytes_of(group[extension]) if extension in group else None

        def header() -> ImageHeader:
            if image is None:
                raise DataError("has no image")
            return self.header_of(group[image])

        code, reason = self.selection.judge(member, header)
        self.codes.append(code)
        if reason:
            self.dropped[reason] += 1

    def bytes_of(self, member: Member) -> bytes:
        return self.read(member.data, member.size)

    def examine_caption(self, key: str, member: Member, extension: str) -> None:
        try:
            self.statistics.add_caption(caption_of({extension: self.bytes_of(member)}, self.caption_source))
        except DataError as error:
            self.note(key, "bad_caption", str(error))

    def examine_json(self, key: str, member: Member) -> None:
        """The json of a sample whose caption is elsewhere: filters and `latents` read it."""
        try:
            record = parse_record(self.bytes_of(member))
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            self.note(key, "bad_json", f"the json member holds what is no text: {error.reason}")
        except DataError as error:
            self.note(key, "bad_json", str(error))

    def examine_image(self, key: str, extension: str, member: Member) -> None:
        try:
            header = self.header_of(member)
            if self.check == "decode":
                verify_image(self.bytes_of(member), max_pixels=self.max_pixels)
        except DataError as error:
            self.note(key, "bad_image", f".{extension}: {error}")
            return
        self.statistics.add_image(header.width, header.height)
        if header.format != format_of(extension):
            self.note(
                key, "wrong_extension", f".{extension} holds a {header.format}; it is decoded all the same"
            )

    def header_of(self, member: Member) -> ImageHeader:
        if member.size > _HEAD:
            try:
                return image_header(self.read(member.data, _HEAD), max_pixels=self.max_pixels)
            except DataError:
                pass  # a header behind a long profile or preview: the whole image is read below
        return image_header(self.bytes_of(member), max_pixels=self.max_pixels)

    def examine_latent(self, key: str, member: Member) -> None:
        try:
            decode_array(self.bytes_of(member))
        except DataError as error:
            self.note(key, "bad_latent", str(error))

    def examine_conditions(
        self, key: str, conditions: ConditionChecks, group: dict[str, Member], image: str | None
    ) -> None:
        def header() -> ImageHeader | None:
            try:
                return None if image is None else self.header_of(group[image])
            except DataError:
                return None  # told of the image already

        members = {name: self.bytes_of(group[name]) for name in conditions.members if name in group}
        for kind, detail in conditions.faults(members, header, self.check, self.max_pixels):
            self.note(key, kind, detail)


def _listed(group: Mapping[str, Member]) -> str:
    """Extensions of a sample; of many the first. A file name with a second dot has most of it taken for the extension."""
    names = sorted(group)
    shown = ", ".join(names[:_LISTED_MEMBERS])
    if len(names) > _LISTED_MEMBERS:
        shown += f" and {len(names) - _LISTED_MEMBERS} more"
    if any("." in name for name in names if name != LATENT):
        shown += "; a key ends at the first dot of the file name"
    return shown


def json_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True).encode("utf-8") + b"\n"

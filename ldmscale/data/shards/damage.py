"""What is wrong with a shard or a sample: its kinds, and how a record of the index keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldmscale import messages

KINDS = {
    "missing_shard": "the shard cannot be found",
    "unreadable_shard": "the shard cannot be read",
    "truncated": "the archive is cut",
    "no_end_mark": "the archive has no end mark",
    "corrupt_header": "the archive makes no sense from here on",
    "data_after_end": "data behind the archive's end",
    "unsafe_name": "a member's name would leave the folder",
    "special_member": "a link or device",
    "sparse_member": "a file that tar -S stored sparse",
    "duplicate_member": "two members of one sample have the same extension",
    "scattered_sample": "members of one sample are not next to each other",
    "too_large": "a sample of 4 GiB or more",
    "missing_member": "a sample lacks its image, latent or caption",
    "empty_member": "a member of zero bytes",
    "bad_caption": "the caption cannot be used",
    "bad_json": "the json is none, or cannot be kept",
    "bad_image": "the image cannot be used",
    "bad_latent": "the latent cannot be used",
    "bad_label": "the label is missing, or no class",
    "bad_boxes": "boxes are missing, outside of the image, or of no class",
    "bad_embeddings": "embeddings are missing, of another shape, or not finite",
    "bad_map": "the map is missing, of another size than the image, or has numbers that are no class",
    "wrong_extension": "the file is of another format than its name says",
    "empty_shard": "the shard holds no sample",
}
"""Kinds of damage, in words."""

UNUSABLE = frozenset(
    {"missing_member", "empty_member", "bad_caption", "bad_image", "bad_latent", "bad_label", "bad_boxes"}
    | {"bad_embeddings", "bad_map"}
)
"""Kinds that make a sample unusable, so that training replaces it."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a shard or a sample (then `key` names it)."""

    shard: str
    key: str
    kind: str  # one of KINDS
    detail: str
    sample: int | None = None  # its number in the shard, where it has a place among the samples

    def __post_init__(self) -> None:
        # It goes into index, report and log, and all but its kind are words of others.
        for part in ("shard", "key", "detail"):
            object.__setattr__(self, part, messages.name(getattr(self, part)))

    def __str__(self) -> str:
        return f"{self.shard}{': ' + self.key if self.key else ''}: {self.kind}: {self.detail}"


def damage_to_json(damage: list[Damage]) -> list[dict[str, Any]]:
    return [
        {"key": item.key, "kind": item.kind, "detail": item.detail}
        | ({} if item.sample is None else {"sample": item.sample})
        for item in damage
    ]


def damage_from_json(shard: str, records: list[dict[str, Any]]) -> list[Damage]:
    return [
        Damage(shard, record["key"], record["kind"], record["detail"], record.get("sample"))
        for record in records
    ]

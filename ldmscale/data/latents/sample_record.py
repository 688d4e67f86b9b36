"""What a set of version 2 stores about the image of a sample: its size, the part that was encoded, its captions.

KEY.sample.json holds it, for whatever reads the tar; sizes and offsets are what conditioning on size and crop needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from ldmscale.errors import DataError
from ldmscale.storage.plain_values import Count, checked, parsed_object

RECORD = "sample.json"
"""Member name of a sample's record."""

Pair = tuple[int, int]


class SampleView(NamedTuple):
    """The part of an image that a latent was made of. All in pixels, widths and lefts first."""

    original: Pair  # size of the image as it is seen: its EXIF orientation is applied
    offset: Pair  # of the part, in the original
    part: Pair  # size of the part, in the original
    size: Pair  # that the part was scaled to

    @property
    def resized(self) -> Pair:
        """Size of the whole image, scaled as its part is."""
        return self._scaled(self.original)

    @property
    def crop(self) -> Pair:
        """Left and top of the part in the resized image."""
        return self._scaled(self.offset)

    def mirrored(self) -> SampleView:
        """The view of the mirrored image."""
        left = self.original[0] - self.part[0] - self.offset[0]
        return self._replace(offset=(left, self.offset[1]))

    def _scaled(self, of_original: Pair) -> Pair:
        (across, down), (width, height), (wide, high) = of_original, self.part, self.size
        return (round(across * wide / width), round(down * high / height))


class _View(BaseModel):
    original: tuple[Count, Count]
    offset: tuple[Count, Count]
    part: tuple[Count, Count]
    size: tuple[Count, Count]


class _Record(BaseModel):
    view: _View | None
    captions: dict[str, str]


def encode_record(view: SampleView | None, captions: Mapping[str, str], text_tokens: int | None) -> bytes:
    """The bytes of KEY.sample.json.

    Args:
        view: None where the image is not known.
        captions: of the source's text members, by their extensions.
        text_tokens: of the caption whose text encoding is stored, without the padding.
    """
    record: dict[str, Any] = {"captions": dict(captions), "view": None}
    if view is not None:
        record["view"] = {**view._asdict(), "resized": view.resized, "crop": view.crop}
    if text_tokens is not None:
        record["text_tokens"] = text_tokens
    return json.dumps(record, sort_keys=True, ensure_ascii=False).encode("utf-8")


def read_record(members: Mapping[str, bytes]) -> tuple[SampleView | None, dict[str, str]]:
    """The view and the captions of a sample.

    Raises:
        DataError: if it has none (version 1), or damaged ones.
    """
    if RECORD not in members:
        raise DataError(
            f"has no {RECORD}: the set is of version 1, which stores no sizes; make the latents anew"
        )
    try:
        found = checked(_Record, parsed_object(members[RECORD]))
    except ValueError as error:
        raise DataError(f"its {RECORD} is damaged: {error}") from error
    view = None if found.view is None else SampleView(**found.view.model_dump())
    return view, found.captions

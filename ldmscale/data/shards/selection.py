"""Which samples of the shards are taken, and into which bucket each goes: decided once, when the index is made.

So the order stays exact: it is an order over the samples that are taken. Unlike damage, which a run notices when a
sample's turn comes, what is not selected has no turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property

from ldmscale.data.conditions.annotations import caption_member, caption_of
from ldmscale.data.conditions.record import parse_record
from ldmscale.data.images.buckets import Shape, bucket_of
from ldmscale.data.images.decode import LATENT, ImageHeader, decode_array
from ldmscale.data.shards.filter import Condition
from ldmscale.errors import DataError
from ldmscale.storage.digest import sha256

FORMAT = "ldmscale-selection-1"


@dataclass(frozen=True)
class Selection:
    """What is taken. A value; two equal ones make equal indices.

    Attributes:
        filter: condition on the sample's json (`expression.Condition`); None takes all.
        min_caption_words, max_caption_words: words that a caption may have.
        min_image_side: shortest side of an image in pixels, by its header.
        shapes: (width, height) of the buckets; empty: no buckets, every image goes the same way.
        caption_source: "txt" or "json:KEY".
        latent_shapes: (height, width) of the latents of each bucket; empty: no buckets, or images.
    """

    filter: str | None = None
    min_caption_words: int = 0
    max_caption_words: int | None = None
    min_image_side: int = 0
    shapes: tuple[Shape, ...] = ()
    caption_source: str = "txt"
    latent_shapes: tuple[tuple[int, int], ...] = ()

    @property
    def everything(self) -> bool:
        """Whether every sample is taken, into one bucket: then no selection needs to be made."""
        return (
            self.filter is None
            and not self.min_caption_words
            and self.max_caption_words is None
            and not self.min_image_side
            and not self.shapes
            and not self.latent_shapes
        )

    @property
    def buckets(self) -> int:
        return max(1, len(self.shapes), len(self.latent_shapes))

    @cached_property
    def key(self) -> str:
        """Identifies the selection in file names and fingerprints."""
        found = asdict(self)
        if not self.latent_shapes:  # selections of before have the same key
            del found["latent_shapes"]
        return sha256(json.dumps([FORMAT, found], sort_keys=True))[:16]

    @cached_property
    def condition(self) -> Condition | None:
        return None if self.filter is None else Condition(self.filter)

    def judge(
        self, member: Callable[[str], bytes | None], header: Callable[[], ImageHeader]
    ) -> tuple[int, str]:
        """Decides on one sample.

        Args:
            member: gives the bytes of the member with an extension, None if there is none.
            header: reads the image's header; raises DataError if that cannot be done.

        Returns:
            (bucket + 1, ""), or (0, the reason why the sample is not taken): "filter", `data.filter` is false;
            "filter_unknown", it asks for json keys that the sample does not have; "caption", the caption is shorter or
            longer than data.min_caption_words and max_caption_words, or unusable; "image", the image is smaller than
            data.min_image_side, or its header unusable; "latent", it is of none of the shapes.
        """
        if self.condition is not None:
            verdict = self.condition(_record(member("json")))
            if not verdict:
                return 0, "filter_unknown" if verdict is None else "filter"
        if self.min_caption_words or self.max_caption_words is not None:
            extension = caption_member(self.caption_source)
            data = member(extension)
            try:
                words = len(
                    caption_of({} if data is None else {extension: data}, self.caption_source).split()
                )
            except DataError:
                return 0, "caption"
            if words < self.min_caption_words or words > (self.max_caption_words or words):
                return 0, "caption"
        if self.latent_shapes:
            return self._by_latent(member(LATENT))
        if not self.min_image_side and not self.shapes:
            return 1, ""
        try:
            found = header()
        except DataError:
            return 0, "image"
        if min(found.width, found.height) < self.min_image_side:
            return 0, "image"
        return 1 + (bucket_of(found.width, found.height, self.shapes) if self.shapes else 0), ""

    def _by_latent(self, data: bytes | None) -> tuple[int, str]:
        try:
            shape = decode_array(data or b"").shape
        except DataError:
            return 0, "latent"
        height_and_width = tuple(shape[1:])
        if height_and_width not in self.latent_shapes:
            return 0, "latent"
        return 1 + self.latent_shapes.index(height_and_width), ""


def _record(data: bytes | None) -> dict[str, object]:
    """The sample's json; what is no json object has no keys."""
    try:
        found = parse_record(data) if data else {}
    except DataError:
        return {}
    return found if isinstance(found, dict) else {}
